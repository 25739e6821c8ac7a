"""Reshard: shards of one plan to shards of another, by intersecting intervals."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .comm import Comm, Op
from .gather import Layout
from .plan import Plan
from .tree import show

Interval = tuple[int, int]


def reshard(shards: Any, from_plan: Plan, to_plan: Plan, comm: Comm) -> Any:
    """``to_plan.shard(from_plan.full(shards))``, with no leaf ever whole: any rule and mesh to any.

    Every rank sends what it has of another's new interval, and takes from itself what it can; of
    copies one sends. Leaves travel one after another, so beside old and new shards a rank holds
    what it sends of one leaf.

    Args:
        shards: of ``from_plan``.
        from_plan: where they live now.
        to_plan: where they are to live: other rules, labels or axes, for as many ranks.
        comm: the ranks; all must call. Its mesh is either plan's, or any other of them.

    Raises:
        ValueError: plans of other leaves, or of another number of ranks; shards that are not of
            ``from_plan``; under a transform, since what moves has no derivative here.

    >>> from sharding import Mesh, expert_parallel, make_plan, simulate, zero3
    >>> params, mesh = {"w": torch.arange(4.0)}, Mesh(edp=2, ep=2)
    >>> a, b = ({"x": rule} for rule in (zero3("edp", "ep"), expert_parallel("ep")))
    >>> a, b = (make_plan(params, {"w": "x"}, rules, mesh) for rules in (a, b))
    >>> simulate(lambda comm: reshard(a.shard(params, comm), a, b, comm)["w"], mesh)
    [tensor([0., 1.]), tensor([2., 3.]), tensor([0., 1.]), tensor([2., 3.])]
    """
    _check(from_plan, to_plan, comm)
    if torch._C._are_functorch_transforms_active():
        raise ValueError("reshard under a transform: move shards before or after, outside of it")
    places = cache(_Places)
    leaves = from_plan.check_sizes(shards, "shards")
    with torch.no_grad():
        moved = [
            _move(x, places(old), places(new), new.shard_size, comm)
            for x, old, new in zip(leaves, from_plan.layouts, to_plan.layouts, strict=True)
        ]
    return to_plan.unflatten(moved)


def _check(from_plan: Plan, to_plan: Plan, comm: Comm) -> None:
    sizes = {from_plan.mesh.size, to_plan.mesh.size, comm.mesh.size}
    if len(sizes) > 1:
        raise ValueError(
            f"{from_plan.mesh}, {to_plan.mesh} and the ranks, {comm.mesh}, differ in how many they "
            "are: save a checkpoint to go on with more ranks or fewer"
        )
    for old, new in zip(from_plan.leaves, to_plan.leaves, strict=False):
        if (old.path, old.shape, old.dtype) != (new.path, new.shape, new.dtype):
            raise ValueError(f"the plans differ in {old} {old.dtype} and {new} {new.dtype}")
    if from_plan.spec != to_plan.spec:
        more = from_plan if len(from_plan.leaves) > len(to_plan.leaves) else to_plan
        extra = more.leaves[min(len(from_plan.leaves), len(to_plan.leaves)) :]
        what = show(extra[0].path) if extra else "their containers"
        raise ValueError(f"the plans are of different params: they differ in {what}")


class _Places:
    """Where a leaf's intervals are: what each rank has, and all that have the same."""

    def __init__(self, layout: Layout) -> None:
        self.intervals = [layout.interval(rank) for rank in layout.mesh]
        self.holders: dict[Interval, list[int]] = {}
        for rank, each in enumerate(self.intervals):
            self.holders.setdefault(each, []).append(rank)

    def sends(self, sender: int, receiver: int) -> bool:
        """Whether it is this one of the copies that sends; the receiver itself, if it has one."""
        holders = self.holders[self.intervals[sender]]
        if receiver in holders:
            return sender == receiver
        return sender == holders[receiver % len(holders)]


def _part(old: _Places, new: _Places, sender: int, receiver: int) -> Interval:
    """What one rank sends another: of what it has, what is wanted; often nothing."""
    (a, b), (c, d) = old.intervals[sender], new.intervals[receiver]
    lo, hi = max(a, c), min(b, d)
    return (lo, hi) if lo < hi and old.sends(sender, receiver) else (c, c)


def _move(x: Tensor, old: _Places, new: _Places, size: int, comm: Comm) -> Tensor:
    """One leaf, by one exchange, into a shard of ``size`` entries."""
    first, start = old.intervals[comm.rank][0], new.intervals[comm.rank][0]
    leaving = [_part(old, new, comm.rank, other) for other in comm.mesh]
    arriving = [_part(old, new, other, comm.rank) for other in comm.mesh]
    send, receive = (tuple(b - a for a, b in parts) for parts in (leaving, arriving))
    pieces = [x[a - first : b - first] for a, b in leaving if a < b]
    sent = torch.cat(pieces) if pieces else x[:0]
    (received,) = comm.start(Op("all_to_all", comm.mesh.axes, send, receive), [sent]).wait()
    shard = x.new_zeros(size)
    for (a, b), piece in zip(arriving, received.split(receive), strict=True):
        shard[a - start : b - start] = piece
    return shard
