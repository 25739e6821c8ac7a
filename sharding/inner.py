"""The inner product of two trees of shards, and what it has in common with their norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .collectives import psum, pvary
from .comm import Comm
from .plan import Copy, Plan

PIECE = 1 << 18  # entries whose products are summed in their own dtype


def dot(a: Any, b: Any, plan: Plan, comm: Comm) -> Tensor:
    """``sum of a_i b_i`` over the whole leaves: each entry once, however many ranks hold it.

    The same float64 scalar on all ranks, under every rule. Differentiable, as a function of two
    whole trees, to any order.

    Args:
        a: shards, or what has their sizes, such as a gradient by them, a moment or a tangent.
        b: the same.
        plan: whose shards they are.
        comm: the ranks; all have to call.

    Raises:
        ValueError: trees that are not of the plan's structure and sizes; another mesh.

    >>> from sharding import Mesh, make_plan, replicated, simulate, zero3
    >>> params = {"w": torch.arange(3.0), "b": torch.ones(2)}
    >>> rules = {"dense": zero3("edp"), "copied": replicated()}
    >>> plan = make_plan(params, {"w": "dense", "b": "copied"}, rules, Mesh(edp=2))
    >>> def program(comm):
    ...     shards = plan.shard(params, comm)
    ...     return dot(shards, shards, plan, comm)
    >>> simulate(program, plan.mesh)
    [tensor(7., dtype=torch.float64), tensor(7., dtype=torch.float64)]
    """
    plan.check_mesh(comm)
    pairs = zip(plan.check_sizes(a, "a"), plan.check_sizes(b, "b"), strict=True)
    parts: list[Tensor] = []
    for (x, y), layout in zip(pairs, plan.layouts, strict=True):
        start, end = layout.interval(comm.rank)  # what pads the last shard is no entry
        parts.append(torch.stack(products(x[: end - start], y[: end - start])).sum())
    return psum(counted_once(parts, plan.copies(comm), comm), comm.mesh.axes, comm)


def counted_once(parts: Sequence[Tensor], copies: Sequence[Copy], comm: Comm) -> Tensor:
    """This rank's summand of a sum over whole leaves, of which each shard has given a part.

    Differentiable: copies are one value, so the derivative by each is that by all of them.
    """
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    for copy in dict.fromkeys(copies):
        same = [part for part, each in zip(parts, copies, strict=True) if each == copy]
        part = torch.stack(same).sum()
        total = total + (pvary(part, copy.axes, comm) if copy.axes else part) * copy.counts
    return total


def products(x: Tensor, y: Tensor) -> list[Tensor]:
    """Parts of the sum of ``x_i y_i``, of flat tensors.

    A CPU sums one addend after another: in float32, of 10^7 at once, half of the digits go.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    pairs = [(x, y)] if x.is_cuda else zip(x.split(PIECE), y.split(PIECE), strict=True)
    return [torch.dot(*pair).double() for pair in pairs]
