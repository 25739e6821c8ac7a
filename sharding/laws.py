"""The laws of rules, each a function of one case and of the functions that are to obey it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .comm import Comm
from .gather import Layout, gather, reduce
from .rule import interval, partition, replicated, shard_size, unpartition, zero3
from .simulate import simulate
from .strategies import Case, exact


class Functions(NamedTuple):
    """What moves a leaf: the functions that the laws are about, by default the library's."""

    interval: Callable[..., tuple[int, int]] = interval
    partition: Callable[..., Tensor] = partition
    unpartition: Callable[..., Tensor] = unpartition
    gather: Callable[..., Sequence[Tensor]] = gather
    reduce: Callable[..., Sequence[Tensor]] = reduce


LIBRARY = Functions()
Law = Callable[[Case, Functions], None]


def check_tiling(case: Case, functions: Functions = LIBRARY) -> None:
    """L1: the intervals of all ranks cover the leaf, each index exactly ``copies`` times."""
    rule, mesh, shape, _ = case
    counts = torch.zeros(math.prod(shape), dtype=torch.int64)
    for rank in mesh:
        lo, hi = functions.interval(rule, mesh, rank, shape)
        assert 0 <= lo <= hi <= len(counts), f"L1 tiling: rank {rank} has ({lo}, {hi}) of {shape}"
        counts[lo:hi] += 1
    _same("L1 tiling", counts, torch.full_like(counts, mesh.count(rule.copies(mesh))), case)


def check_round_trip(case: Case, functions: Functions = LIBRARY) -> None:
    """L2: ``unpartition(partition(x)) = x`` and ``partition(x) = pad(ravel(x)[lo:hi])``."""
    rule, mesh, shape, seed = case
    x = exact(shape, seed)
    shards = [functions.partition(rule, mesh, rank, x) for rank in mesh]
    for rank, shard in enumerate(shards):
        lo, hi = functions.interval(rule, mesh, rank, shape)
        padding = x.new_zeros(shard_size(rule, mesh, shape) - (hi - lo))
        _same(f"L2 shard of rank {rank}", shard, torch.cat([x.reshape(-1)[lo:hi], padding]), case)
    _same("L2 round trip", functions.unpartition(rule, mesh, shards, shape), x, case)


def check_view(case: Case, functions: Functions = LIBRARY) -> None:
    """L3: ``gather(partition(x))`` is the rank's slice of dim 0 of x."""
    rule, mesh, shape, seed = case
    x, layouts = exact(shape, seed), [_layout(case)]
    shards = [functions.partition(rule, mesh, rank, x) for rank in mesh]
    views = simulate(lambda comm, s: functions.gather(layouts, [s], comm)[0], mesh, shards)
    for rank, view in enumerate(views):
        slices = x.tensor_split(mesh.count(rule.compute)) if rule.compute and x.dim() else [x]
        _same(f"L3 view of rank {rank}", view, slices[mesh.index(rank, rule.compute)], case)


def check_adjoint(case: Case, functions: Functions = LIBRARY) -> None:
    """L4: ``sum of <reduce(g), s> / copies = sum of <g, gather(s)>`` and ``reduce = vjp(gather)``.

    The sums are over all ranks, with another g on each.
    """
    rule, mesh, _, _ = case
    shards, layouts = _shards(case), [_layout(case)]

    def program(comm: Comm, s: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        gather = functions.gather
        view, pull = torch.func.vjp(lambda s: gather(layouts, [s], comm)[0], s)[:2]
        return view, functions.reduce(layouts, [g], comm)[0], pull(g)[0]

    cotangents = _cotangents(case)
    left = right = torch.zeros((), dtype=torch.float64)
    results = simulate(program, mesh, shards, cotangents)
    for rank, (view, reduced, pulled) in enumerate(results):
        _same(f"L4 reduce = vjp(gather) on rank {rank}", reduced, pulled, case)
        left = left + (reduced * shards[rank]).sum()
        right = right + (cotangents[rank] * view).sum()
    _same("L4 adjoint", left, right * mesh.count(rule.copies(mesh)), case)


def check_isolation(case: Case, functions: Functions = LIBRARY) -> None:
    """L7: a leaf's shard, view and gradient are the same next to leaves that are all NaN."""
    mesh, shards, cotangents = case.mesh, _shards(case), _cotangents(case)
    near = [Layout(rule, mesh, (5,), torch.float64) for rule in (replicated(), zero3(*mesh.axes))]
    poison = [torch.full((w.shard_size,), math.nan, dtype=w.dtype) for w in near]
    poisoned_view = torch.full((5,), math.nan, dtype=torch.float64)
    layouts = [near[0], _layout(case), near[1]]

    def program(comm: Comm, s: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        together = functions.gather(layouts, [poison[0], s, poison[1]], comm)[1]
        grads = functions.reduce(layouts, [poisoned_view, g, poisoned_view], comm)[1]
        alone = functions.gather(layouts[1:2], [s], comm)[0]
        return together, alone, grads, functions.reduce(layouts[1:2], [g], comm)[0]

    for rank, results in enumerate(simulate(program, mesh, shards, cotangents)):
        _same(f"L7 view of rank {rank}", results[0], results[1], case)
        _same(f"L7 gradient of rank {rank}", results[2], results[3], case)


def check_accounting(case: Case, functions: Functions = LIBRARY) -> None:
    """L8: compute, store and copies partition the axes of the mesh; copies have one interval."""
    rule, mesh, shape, _ = case
    axes = (*rule.compute, *rule.store, *rule.copies(mesh))
    assert sorted(axes) == sorted(mesh.axes), f"L8 accounting: {axes} are not those of {mesh}"
    for rank in mesh:
        copies = mesh.fiber(rank, rule.copies(mesh))
        held = {functions.interval(rule, mesh, copy, shape) for copy in copies}
        assert len(held) == 1, f"L8 accounting: the copies {copies} hold {held} of {shape}"


def check_purity(case: Case, functions: Functions = LIBRARY) -> None:
    """L9: inputs stay as they are, same inputs give same outputs, shards are their own memory."""
    rule, mesh, shape, seed = case
    x, layouts = exact(shape, seed), [_layout(case)]

    def program(comm: Comm, g: Tensor) -> tuple[Tensor, ...]:
        def once() -> tuple[Tensor, ...]:
            s = functions.partition(rule, mesh, comm.rank, x)
            assert not _share_memory(s, x), f"L9 purity: the shard is part of the leaf, {case}"
            before = s.clone()
            view = functions.gather(layouts, [s], comm)[0].clone()
            reduced = functions.reduce(layouts, [g], comm)[0].clone()
            _same("L9 shard after gather", s, before, case)
            return s, view, reduced

        first, again = once(), once()
        for a, b in zip(first, again, strict=True):
            _same("L9 second call", b, a, case)
        return first

    cotangents = _cotangents(case)
    shards = [result[0] for result in simulate(program, mesh, cotangents)]
    kept = [s.clone() for s in shards]
    for _ in range(2):
        _same("L9 unpartition", functions.unpartition(rule, mesh, shards, shape), x, case)
    for found, expected in zip(shards + cotangents, kept + _cotangents(case), strict=True):
        _same("L9 input", found, expected, case)
    _same("L9 leaf", x, exact(shape, seed), case)


LAWS: tuple[Law, ...] = (
    check_tiling,
    check_round_trip,
    check_view,
    check_adjoint,
    check_isolation,
    check_accounting,
    check_purity,
)


def _layout(case: Case) -> Layout:
    return Layout(case.rule, case.mesh, case.shape, torch.float64)


def _shards(case: Case) -> list[Tensor]:
    """A random shard for each place, the same on all copies, with noise where padding would be."""
    rule, mesh, shape, seed = case
    size = shard_size(rule, mesh, shape)
    return [exact((size,), seed + mesh.index(rank, rule.axes)) for rank in mesh]


def _cotangents(case: Case) -> list[Tensor]:
    """A gradient of the view for each rank, different on all."""
    shape = _layout(case).view_shape
    return [exact(shape, case.seed + case.mesh.size + rank) for rank in case.mesh]


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def _same(law: str, found: Tensor, expected: Tensor, case: Case) -> None:
    assert found.dtype == expected.dtype and torch.equal(found, expected), (
        f"{law}: found {found}, expected {expected}, for a leaf {case.shape} under {case.rule} "
        f"on {case.mesh}"
    )
