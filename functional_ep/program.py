"""What a rank runs: a recipe's model, optimizer and train step as functions of shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import optree
import torch
from torch import Tensor

from sharding import Comm, Plan, Precision, expert_parallel, make_plan, zero3

from . import lm
from .config import Recipe
from .data import Batch
from .huggingface import from_huggingface, to_huggingface
from .huggingface.idle import standing_in
from .optim import Optimizer, adamw
from .schedules import cosine
from .state import State, init_state
from .train_step import make_train_step
from .vocabulary import Vocabulary, bytewise, of_directory

RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
PRECISION = {"fp32": Precision(), "bf16": Precision(compute=torch.bfloat16)}

Loss = Callable[[Any, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


class CannotStart(ValueError):
    """What was asked for cannot be built, or cannot be fed with the text; the message says why."""


class Program(NamedTuple):
    """One rank's functions of the shards, and the state they start from."""

    description: str
    parameters: int
    plan: Plan
    vocabulary: Vocabulary
    tokens: int  # that the model knows
    loss: Loss  # as in evaluation, without dropout
    logits: Callable[[Any, Tensor], Tensor]
    step: Callable[[State, Batch], tuple[State, dict[str, Tensor]]]
    start: Callable[[], State]  # the state before the first step
    save: Callable[[State, Path], None]  # weights for other programs


def build(comm: Comm, recipe: Recipe) -> Program:
    """The recipe's program on this rank of the mesh.

    Raises:
        CannotStart: weights that cannot be read or split so.
    """
    if not recipe.weights:
        return _from_scratch(comm, recipe)
    with _startable():
        return _from_weights(comm, recipe)


@contextmanager
def _startable() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise CannotStart(error) from error


def _from_scratch(comm: Comm, recipe: Recipe) -> Program:
    cfg = recipe.model
    plan = make_plan(lm.shapes(cfg), lm.labels, RULES, comm.mesh, PRECISION[recipe.precision])
    loss = lm.loss(cfg, plan, comm, backward="regather", compile=recipe.compile)
    tx = _optimizer(recipe)

    def start() -> State:
        shards: Any = plan.shard(lm.init(cfg, recipe.seed), comm)  # the whole of them is not kept
        return init_state(optree.tree_map(lambda x: x.to(comm.device), shards), plan, tx)

    return Program(
        description=f"{cfg.layers} layers, {cfg.experts} experts, top-{cfg.top_k}",
        parameters=_size(plan),
        plan=plan,
        vocabulary=bytewise(),
        tokens=cfg.vocab,
        loss=loss,
        logits=lm.apply(cfg, plan, comm),
        step=make_train_step(loss, plan, tx, comm, clip=recipe.clip, donate=True),
        start=start,
        save=lambda state, path: None,
    )


def _from_weights(comm: Comm, recipe: Recipe) -> Program:
    directory = Path(recipe.weights)
    model = from_huggingface(directory, dtype=torch.float32)
    plan = make_plan(model.shapes, model.labels, RULES, comm.mesh, PRECISION[recipe.precision])
    apply, embeddings = model.apply(plan, comm), cast(Any, model.skeleton.get_input_embeddings())
    loss, tx = model.loss(plan, comm, compile=recipe.compile), _optimizer(recipe)

    def logits(shards: Any, ids: Tensor) -> Tensor:
        return apply(shards, **standing_in({"input_ids": ids})).logits[: len(ids)]

    def start() -> State:
        with _startable():
            return init_state(model.load(plan, comm), plan, tx)

    return Program(
        description=type(model.skeleton).__name__,
        parameters=_size(plan),
        plan=plan,
        vocabulary=of_directory(directory),
        tokens=embeddings.weight.shape[0],
        loss=model.loss(plan, comm, training=False),
        logits=logits,
        step=make_train_step(loss, plan, tx, comm, clip=recipe.clip, donate=True),
        start=start,
        save=lambda state, path: to_huggingface(path, state.params, plan, comm, model),
    )


def _optimizer(recipe: Recipe) -> Optimizer:
    warmup = int(recipe.warmup * recipe.steps)
    schedule = cosine(recipe.lr, warmup=warmup, total=recipe.steps)
    return adamw(schedule, weight_decay=recipe.weight_decay)


def _size(plan: Plan) -> int:
    return sum(math.prod(leaf.shape) for leaf in plan.leaves)
