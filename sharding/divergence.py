"""How ranks that part ways are described: what differs, and where each of them stands."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from .comm import Op
from .mesh import Mesh

MOST = 20  # tensors that a message names


class Started(Protocol):
    """A collective that a rank has started."""

    op: Op
    xs: list[Tensor]
    fiber: tuple[int, ...]


def table(headline: str, mesh: Mesh, states: Sequence[str]) -> str:
    """A line per rank, and what to do about it."""
    lines = [f"  rank {rank} {mesh.coords(rank)}: {state}" for rank, state in enumerate(states)]
    advice = (
        "Every rank of a fiber must start the same collectives in the same order, a\n"
        "rank with no tokens too: put no collective behind a condition on local data."
    )
    return "\n".join([headline, "", *lines, "", advice])


def mismatch(works: Mapping[int, Started]) -> str:
    """What differs between the last of the collectives of a fiber and those before, or nothing."""
    *before, (s, work) = works.items()
    for r, first in before:
        if (work.op.kind, work.op.axes) != (first.op.kind, first.op.axes):
            return f"Ranks {r} and {s} started different collectives"
        if work.op.of != first.op.of:
            return f"Rank {r} is at {first.op.of!r} and rank {s} at {work.op.of!r}"
        if [x.dtype for x in work.xs] != [x.dtype for x in first.xs]:
            return f"Ranks {r} and {s} sent tensors of different number or dtype"
        skip = 1 if work.op.kind == "all_to_all" else 0  # rows may differ there
        if [x.shape[skip:] for x in work.xs] != [x.shape[skip:] for x in first.xs]:
            return f"Ranks {r} and {s} sent tensors of different shapes"
        i, j = first.fiber.index(r), first.fiber.index(s)
        if work.op.kind == "all_to_all" and (
            first.op.send[j] != work.op.receive[i] or work.op.send[i] != first.op.receive[j]
        ):
            return f"What rank {r} sends to rank {s} is not what rank {s} expects, or the reverse"
    return ""


def kinds(xs: Sequence[Tensor], skip: int = 0, most: int = MOST) -> str:
    """Dtypes and shapes in a few words, without the first ``skip`` dims.

    >>> kinds([torch.zeros(2, 3), torch.zeros(5)])
    '[float32[2, 3], float32[5]]'
    >>> kinds([torch.zeros(2)] * 3, most=1)
    '[float32[2] and 2 more]'
    """
    named = ", ".join([f"{str(x.dtype)[6:]}{list(x.shape[skip:])}" for x in xs[:most]])
    return f"[{named} and {len(xs) - most} more]" if len(xs) > most else f"[{named}]"


class Kinds:
    """Dtypes and shapes of tensors that are not kept, put into words when they are asked for."""

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.kinds = [(x.dtype, x.shape) for x in xs]

    def __str__(self) -> str:
        return kinds(
            [torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in self.kinds]
        )


def where(thread: Thread | None) -> str:
    """The line of the user's program in which a thread stands, if it is in one."""
    elsewhere = {Path(__file__).parent, Path(torch.__file__).parent}
    frame: FrameType | None = None
    if thread is not None and thread.ident is not None:
        frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if elsewhere.isdisjoint(file.parents) and file.name != "threading.py":
            return f"\n      in {frame.f_code.co_name} ({file.name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
