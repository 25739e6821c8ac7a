"""Gather: shard -> view. Reduce, its transpose: gradient of the view -> gradient of the shard.

Both act on the leaves of a whole block at once and start as one linear map, so that one message
carries many leaves and transfers run ahead of the compute. There is only SUM: no average and no
divisor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .collectives import Linear, apply
from .comm import Comm, Op, Then, Work
from .mesh import Axes, Mesh
from .rule import Rule, Shape, interval, shard_size, view_shape

Key = TypeVar("Key")


class Precision(NamedTuple):
    """What ``gather`` casts to and what ``reduce`` sums in; shards keep the dtype of their leaf.

    >>> Precision(compute=torch.bfloat16, reduce=torch.float32)
    Precision(compute=torch.bfloat16, reduce=torch.float32)
    """

    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None


@dataclass(frozen=True)
class Layout:
    """A leaf's rule on a mesh, with everything that follows from it worked out."""

    rule: Rule
    mesh: Mesh
    shape: Shape
    dtype: torch.dtype
    precision: Precision = Precision()
    frozen: bool = False  # gathered, but never differentiated: there is nothing to reduce

    @cached_property
    def view_shape(self) -> Shape:
        return view_shape(self.rule, self.mesh, self.shape)

    @cached_property
    def view_size(self) -> int:
        return math.prod(self.view_shape)

    @cached_property
    def shard_size(self) -> int:
        return shard_size(self.rule, self.mesh, self.shape)

    def interval(self, rank: int) -> tuple[int, int]:
        """Of the ravelled leaf, what a rank's shard is."""
        return interval(self.rule, self.mesh, rank, self.shape)

    @cached_property
    def padding(self) -> int:
        return self.shard_size * self.mesh.count(self.rule.store) - self.view_size

    @cached_property
    def store(self) -> Axes:
        """The axes to gather over: none if they have one rank."""
        return self.rule.store if self.mesh.count(self.rule.store) > 1 else ()

    @cached_property
    def copies(self) -> Axes:
        """The axes to sum copies over: none if they have one rank."""
        axes = self.rule.copies(self.mesh)
        return axes if self.mesh.count(axes) > 1 else ()

    @cached_property
    def compute_dtype(self) -> torch.dtype:
        return self.precision.compute or self.dtype

    @cached_property
    def reduce_dtype(self) -> torch.dtype:
        return self.precision.reduce or self.dtype

    @cached_property
    def is_fetched(self) -> bool:
        """Whether the view is memory of its own, rather than the shard seen in another shape."""
        return bool(self.store) or self.compute_dtype != self.dtype

    @cached_property
    def is_local(self) -> bool:
        """Whether neither the view nor its gradient travels: the view is the shard, reshaped."""
        reduced = self.copies or self.reduce_dtype != self.dtype
        return not self.is_fetched and (self.frozen or not reduced)


class _Several(NamedTuple):
    """Transfers under way for groups of positions; awaiting them restores the order."""

    total: int
    parts: list[tuple[list[int], Work]]

    def wait(self) -> list[Tensor]:
        results: dict[int, Tensor] = {}
        for positions, work in self.parts:
            results.update(zip(positions, work.wait(), strict=True))
        return [results[i] for i in range(self.total)]


class Gather(NamedTuple):
    """``[s, *] -> [view, *]`` for each leaf: all-gather over the store axes, trim, reshape."""

    layouts: tuple[Layout, ...]
    of: str = ""  # whose the leaves are, as ``Op.of``

    def start(self, xs: list[Tensor], comm: Comm) -> Work:
        parts: list[tuple[list[int], Work]] = []
        for axes, positions in _group([layout.store for layout in self.layouts]).items():
            group = [xs[i].to(self.layouts[i].compute_dtype) for i in positions]
            parts.append((positions, comm.start(Op("all_gather", axes, of=self.of), group)))
        return Then(_Several(len(xs), parts), self._finish)

    def _finish(self, ys: list[Tensor]) -> list[Tensor]:
        return [
            y[: layout.view_size].reshape((*layout.view_shape, *y.shape[1:]))
            for y, layout in zip(ys, self.layouts, strict=True)
        ]

    @property
    def transpose(self) -> Linear:
        return Reduce(self.layouts, self.of)


class Reduce(NamedTuple):
    """``[view, *] -> [s, *]`` for each leaf: reduce-scatter over store, sum over the copies."""

    layouts: tuple[Layout, ...]
    of: str = ""

    def start(self, xs: list[Tensor], comm: Comm) -> Work:
        parts: list[tuple[list[int], Work]] = []
        groups = _group([(layout.store, layout.copies) for layout in self.layouts])
        for (store, copies), positions in groups.items():
            flat = [_flatten(xs[i], self.layouts[i]) for i in positions]
            parts.append((positions, _sum_over(store, copies, flat, comm, self.of)))
        return Then(_Several(len(xs), parts), self._finish)

    def _finish(self, ys: list[Tensor]) -> list[Tensor]:
        return [y.to(layout.dtype) for y, layout in zip(ys, self.layouts, strict=True)]

    @property
    def transpose(self) -> Linear:
        return Gather(self.layouts, self.of)


def _group(keys: Sequence[Key]) -> dict[Key, list[int]]:
    groups: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


def _flatten(g: Tensor, layout: Layout) -> Tensor:
    batch = g.shape[len(layout.view_shape) :]
    flat = g.reshape(layout.view_size, *batch).to(layout.reduce_dtype)
    if not layout.padding:
        return flat
    return torch.nn.functional.pad(flat, [0, 0] * len(batch) + [0, layout.padding])


def _sum_over(store: Axes, copies: Axes, flat: list[Tensor], comm: Comm, of: str) -> Work:
    over_copies = Op("all_reduce", copies, of=of)
    if not store and copies:
        return comm.start(over_copies, flat)
    scattered = comm.start(Op("reduce_scatter", store, of=of), flat)
    return Then(scattered, lambda ys: comm.start(over_copies, ys).wait()) if copies else scattered


def gather(layouts: Sequence[Layout], shards: Sequence[Tensor], comm: Comm) -> tuple[Tensor, ...]:
    """``shard -> view`` for each leaf; transpose: :func:`reduce`. Differentiable to any order.

    Copies become varying on the way (``pvary``), so that the gradient is summed over them.

    >>> from sharding import Mesh, simulate, zero3
    >>> layout = Layout(zero3("edp"), Mesh(edp=2), (3,), torch.float32)
    >>> shards = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])]
    >>> simulate(lambda comm, x: gather([layout], [x], comm)[0], layout.mesh, shards)[1]
    tensor([1., 2., 3.])
    """
    return apply(Gather(tuple(layouts)), shards, comm)


def reduce(layouts: Sequence[Layout], grads: Sequence[Tensor], comm: Comm) -> tuple[Tensor, ...]:
    """``gradient of the view -> gradient of the shard`` for each leaf: the transpose of gather.

    >>> from sharding import Mesh, simulate, zero3
    >>> layout = Layout(zero3("edp"), Mesh(edp=2), (3,), torch.float32)
    >>> simulate(lambda comm: reduce([layout], [torch.ones(3)], comm)[0], layout.mesh)
    [tensor([2., 2.]), tensor([2., 0.])]
    """
    return apply(Reduce(tuple(layouts)), grads, comm)
