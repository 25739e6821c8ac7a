"""What a system gives the benchmark: a function that makes one step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from peers.shapes import Job
from peers.traffic import Traffic


class Counter(Protocol):
    """Says how many bytes were sent while it was active."""

    @property
    def sent(self) -> int: ...


class Trainer(NamedTuple):
    """``step(i)`` trains on the i-th batch; its result is the mean loss over the whole batch."""

    step: Callable[[int], float]
    parameters: int
    traffic: Callable[[], AbstractContextManager[Counter]] = Traffic


Start = Callable[[Job, Path], AbstractContextManager[Trainer]]


def mean_over_ranks(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def dtype_of(job: Job) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[job.dtype]
