"""Every collective twice: as a program for one rank, and densely, for all ranks at once.

Both act on parameters, a pair of numbers per leaf and rank, so that all ranks have derivatives of
one size whatever travels between them:

    x = sum of p**3 * embedding        y = collective(x)        result = <projection, y**2>

All numbers are multiples of small powers of two, so that float64 has no rounding in them. Densely,
the parameters of all ranks are the rows of a matrix. Where ranks hold one value (``counts_once``),
one row stands for all of its copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from sharding import Comm, Mesh, Rule
from sharding.collectives import all_gather, all_to_all, psum, pvary, reduce_scatter
from sharding.gather import Layout, gather, reduce
from sharding.mesh import Axes
from sharding.rule import Shape, shard_size, view_shape
from sharding.testing import axes_of, exact, rules, seeds, shapes

PARTNERS = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "psum": "pvary",
    "pvary": "psum",
    "all_to_all": "all_to_all",
    "gather": "reduce",
    "reduce": "gather",
}
KINDS = tuple(PARTNERS)
PARAMETERS = 2


class Sample(NamedTuple):
    """A collective with its sizes. ``rows[r][i]``: what rank r sends to the i-th of its fiber."""

    kind: str
    mesh: Mesh
    axes: Axes
    rules: tuple[Rule, ...]
    shapes: tuple[Shape, ...]
    rows: tuple[tuple[int, ...], ...]
    seed: int

    @property
    def leaves(self) -> range:
        return range(len(self.shapes))

    def receive(self, rank: int) -> list[int]:
        """How many rows come from each rank of the fiber."""
        fiber = self.mesh.fiber(rank, self.axes)
        return [self.rows[peer][fiber.index(rank)] for peer in fiber]

    def input_shape(self, rank: int, leaf: int) -> Shape:
        shape = self.shapes[leaf]
        if self.kind == "gather":
            return (shard_size(self.rules[leaf], self.mesh, shape),)
        if self.kind == "reduce":
            return view_shape(self.rules[leaf], self.mesh, shape)
        return (sum(self.rows[rank]), *shape) if self.kind == "all_to_all" else shape

    def output_shape(self, rank: int, leaf: int) -> Shape:
        shape, n = self.shapes[leaf], self.mesh.count(self.axes)
        if self.kind in ("gather", "reduce"):
            other = "reduce" if self.kind == "gather" else "gather"
            return self._replace(kind=other).input_shape(rank, leaf)
        if self.kind == "all_to_all":
            return (sum(self.receive(rank)), *shape)
        rows = {"all_gather": lambda k: k * n, "reduce_scatter": lambda k: k // n}.get(self.kind)
        return (rows(shape[0]), *shape[1:]) if rows else shape

    def holder(self, rank: int, leaf: int, side: str) -> int:
        """The rank whose row stands for this rank's value, as an input or as an output."""
        once = {"input": ("pvary", "gather"), "output": ("psum", "reduce")}[side]
        if self.kind not in once:
            return rank
        copies = self.rules[leaf].copies(self.mesh) if self.rules else self.axes
        return min(self.mesh.fiber(rank, copies))

    def holders(self, leaf: int, side: str) -> list[int]:
        return [self.holder(rank, leaf, side) for rank in self.mesh]

    def counts_once(self, leaf: int, side: str) -> Tensor:
        """A column with a one for each row that stands for a value, a zero for further copies."""
        alone = [float(self.holder(rank, leaf, side) == rank) for rank in self.mesh]
        return torch.tensor(alone, dtype=torch.float64).unsqueeze(1)

    def partner(self) -> Sample:
        """The collective that this one's cotangents go through, on this one's outputs."""
        shapes, rows, n = self.shapes, self.rows, self.mesh.count(self.axes)
        if self.kind == "all_gather":
            shapes = tuple((shape[0] * n, *shape[1:]) for shape in shapes)
        if self.kind == "reduce_scatter":
            shapes = tuple((shape[0] // n, *shape[1:]) for shape in shapes)
        if self.kind == "all_to_all":
            rows = tuple(tuple(self.receive(rank)) for rank in self.mesh)
        return self._replace(kind=PARTNERS[self.kind], shapes=shapes, rows=rows)


@st.composite
def samples(draw: st.DrawFn, mesh: Mesh, kind: str) -> Sample:
    """Collectives of up to three leaves on a mesh."""
    axes, count = draw(axes_of(mesh)), draw(st.integers(1, 2))
    n, of_leaves, sizes = mesh.count(axes), (), st.integers(0, 3)
    if kind in ("gather", "reduce"):
        of_leaves = tuple(draw(rules(mesh)) for _ in range(count))
        drawn = [draw(shapes(mesh.count(rule.compute), max_dims=2)) for rule in of_leaves]
    elif kind in ("all_gather", "reduce_scatter"):
        rows = n if kind == "reduce_scatter" else 1
        drawn = [(draw(sizes) * rows, draw(sizes)) for _ in range(count)]
    else:
        drawn = [draw(shapes(max_dims=2)) for _ in range(count)]
    splits = st.lists(sizes, min_size=n, max_size=n).map(tuple)
    rows = tuple(draw(splits) for _ in mesh) if kind == "all_to_all" else ()
    return Sample(kind, mesh, axes, of_leaves, tuple(drawn), rows, draw(seeds()))


def local(sample: Sample, comm: Comm) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The collective between embedding and projection, as this rank computes it."""
    ends = [_ends(sample, comm.rank, leaf) for leaf in sample.leaves]

    def f(parameters: Sequence[Tensor]) -> list[Tensor]:
        xs = [_embed(e, p) for (e, _), p in zip(ends, parameters, strict=True)]
        ys = collective(sample, xs, comm)
        return [_project(e, y) for (_, e), y in zip(ends, ys, strict=True)]

    return f


def collective(sample: Sample, xs: Sequence[Tensor], comm: Comm) -> Sequence[Tensor]:
    """The collective itself, on one rank's leaves."""
    if sample.kind in ("gather", "reduce"):
        move = gather if sample.kind == "gather" else reduce
        pairs = zip(sample.rules, sample.shapes, strict=True)
        layouts = [Layout(rule, sample.mesh, shape, torch.float64) for rule, shape in pairs]
        return move(layouts, xs, comm)
    if sample.kind == "all_to_all":
        splits = sample.rows[comm.rank], sample.receive(comm.rank)
        return [all_to_all(x, sample.axes, comm, *splits) for x in xs]
    names = {"all_gather": all_gather, "reduce_scatter": reduce_scatter, "psum": psum}
    return [names.get(sample.kind, pvary)(x, sample.axes, comm) for x in xs]


def dense(sample: Sample) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The same on all ranks at once, ``[ranks, PARAMETERS]`` for each leaf, with no collective."""
    ends = [[_ends(sample, rank, leaf) for rank in sample.mesh] for leaf in sample.leaves]
    counts = [sample.counts_once(leaf, "output") for leaf in sample.leaves]

    def f(parameters: Sequence[Tensor]) -> list[Tensor]:
        results: list[Tensor] = []
        for leaf, p in enumerate(parameters):
            holders = sample.holders(leaf, "input")
            xs = [_embed(ends[leaf][rank][0], p[h]) for rank, h in enumerate(holders)]
            ys = [_dense(sample, leaf, rank, xs) for rank in sample.mesh]
            rows = [_project(ends[leaf][rank][1], y) for rank, y in enumerate(ys)]
            results.append(torch.stack(rows) * counts[leaf])
        return results

    return f


def _dense(sample: Sample, leaf: int, rank: int, xs: Sequence[Tensor]) -> Tensor:
    kind, mesh, axes = sample.kind, sample.mesh, sample.axes
    if kind in ("gather", "reduce"):
        rule, shape = sample.rules[leaf], sample.shapes[leaf]
        fiber, place = mesh.fiber(rank, rule.store), mesh.index(rank, rule.store)
        if kind == "gather":
            view = view_shape(rule, mesh, shape)
            return torch.cat([xs[r] for r in fiber])[: math.prod(view)].reshape(view)
        size = shard_size(rule, mesh, shape)
        total = _sum([xs[r] for r in mesh.fiber(rank, rule.store + rule.copies(mesh))])
        padding = total.new_zeros(size * len(fiber) - total.numel())
        return torch.cat([total.reshape(-1), padding])[place * size : (place + 1) * size]
    fiber, place = mesh.fiber(rank, axes), mesh.index(rank, axes)
    if kind == "all_gather":
        return torch.cat([xs[r] for r in fiber])
    if kind == "psum":
        return _sum([xs[r] for r in fiber])
    if kind == "pvary":
        return xs[rank]
    if kind == "all_to_all":
        return torch.cat([xs[r].split(sample.rows[r])[place] for r in fiber])
    rows = xs[rank].shape[0] // len(fiber)
    return _sum([xs[r] for r in fiber])[place * rows : (place + 1) * rows]


def _sum(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs)).sum(0)


def _ends(sample: Sample, rank: int, leaf: int) -> tuple[Tensor, Tensor]:
    """The embedding and the projection of a rank; the same where ranks hold one value."""
    seed = sample.seed + 64 * leaf
    shape = (*sample.input_shape(rank, leaf), PARAMETERS)
    embedding = exact(shape, seed + sample.holder(rank, leaf, "input"))
    shape = (*sample.output_shape(rank, leaf), PARAMETERS)
    return embedding, exact(shape, seed + 32 + sample.holder(rank, leaf, "output"))


def _embed(embedding: Tensor, p: Tensor) -> Tensor:
    return (embedding * p**3).sum(-1)


def _project(projection: Tensor, y: Tensor) -> Tensor:
    return (projection * (y**2).unsqueeze(-1)).reshape(-1, PARAMETERS).sum(0)
