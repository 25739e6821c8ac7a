"""Mixture-of-Experts training as pure functions: the same numbers on every mesh.

The state is a pytree; labels say which leaves follow expert parallelism and which ZeRO-3; the step
is a function ``(state, batch) -> (state, metrics)``.
"""

from sharding import Precision

from . import lm
from .checkpoint import Checkpoints, restore, restore_params, save
from .compile import compiled, uncompiled
from .evaluate import make_evaluate
from .huggingface import from_huggingface, to_huggingface
from .labels import freeze, label_by_path, train_only
from .optim import Optimizer, adamw, sgd
from .recordings.compare import Difference, bisect
from .recordings.record import record
from .recordings.replay import replay
from .schedules import constant, cosine, linear, wsd
from .state import State, init_state, reshard_state
from .train_step import make_train_step
from .vote import Reason, Vetoed, Vote, vetoes_in_a_row, why

__all__ = [
    "Checkpoints",
    "Difference",
    "Optimizer",
    "Precision",
    "Reason",
    "State",
    "Vetoed",
    "Vote",
    "adamw",
    "bisect",
    "compiled",
    "constant",
    "cosine",
    "freeze",
    "from_huggingface",
    "init_state",
    "label_by_path",
    "linear",
    "lm",
    "make_evaluate",
    "make_train_step",
    "record",
    "replay",
    "reshard_state",
    "restore",
    "restore_params",
    "save",
    "sgd",
    "to_huggingface",
    "train_only",
    "uncompiled",
    "vetoes_in_a_row",
    "why",
    "wsd",
]
