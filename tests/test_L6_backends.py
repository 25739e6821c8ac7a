"""L6: each raw operation is its list specification; simulated and real ranks agree to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import pytest
import torch
from budget import real
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sharding.specification
from sharding import Comm, Mesh, simulate
from sharding.comm import Kind, Op
from sharding.distributed.gloo import SMALL, GlooLink
from sharding.distributed.pairwise import ONE_HOP, PairwiseComm
from sharding.mesh import Axes
from sharding.rule import Shape
from sharding.testing import axes_of, meshes, seeds

KINDS: tuple[Kind, ...] = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
ROWS = st.integers(0, 3)


class Tensors(NamedTuple):
    """One tensor of a list, on every rank: its shape (without the rows of an all_to_all)."""

    shape: Shape
    dtype: torch.dtype
    transposed: bool = False


class Call(NamedTuple):
    """A raw collective on a list of tensors; ``rows`` as in an all_to_all, one tuple a rank."""

    kind: Kind
    axes: Axes
    tensors: tuple[Tensors, ...]
    rows: tuple[tuple[int, ...], ...] = ()
    seed: int = 0

    def op(self, mesh: Mesh, rank: int) -> Op:
        if self.kind != "all_to_all":
            return Op(self.kind, self.axes)
        receive = [self.rows[peer][mesh.index(rank, self.axes)] for peer in self.fiber(mesh, rank)]
        return Op(self.kind, self.axes, self.rows[rank], tuple(receive))

    def fiber(self, mesh: Mesh, rank: int) -> tuple[int, ...]:
        return mesh.fiber(rank, self.axes)

    def sent(self, rank: int) -> list[Tensor]:
        """Numbers whose sum depends on the order in which they are added."""
        stream = torch.Generator().manual_seed(self.seed + rank)
        xs: list[Tensor] = []
        for shape, dtype, transposed in self.tensors:
            if self.kind == "all_to_all":
                shape = (sum(self.rows[rank]), *shape)
            x = torch.randn(shape[::-1] if transposed else shape, generator=stream) * 100
            xs.append((_transpose(x) if transposed else x).to(dtype))
        return xs


def _transpose(x: Tensor) -> Tensor:
    return x.permute(tuple(range(x.dim()))[::-1])


@st.composite
def calls(draw: st.DrawFn, mesh: Mesh) -> Call:
    """Collectives on lists of up to four tensors, of mixed sizes and dtypes."""
    kind, axes = draw(st.sampled_from(KINDS)), draw(axes_of(mesh))
    ranks = mesh.count(axes)
    tensors: list[Tensors] = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(ROWS, max_size=2)))
        if kind in ("all_gather", "reduce_scatter"):
            rows = draw(st.sampled_from([1, 0, 2, SMALL // 8]))
            shape = (rows * ranks if kind == "reduce_scatter" else rows, *shape)
        tensors.append(Tensors(shape, draw(st.sampled_from(DTYPES)), draw(st.booleans())))
    splits = st.lists(ROWS, min_size=ranks, max_size=ranks).map(tuple)
    rows = tuple(draw(splits) for _ in mesh) if kind == "all_to_all" else ()
    return Call(kind, axes, tuple(tensors), rows, draw(seeds()))


def program(comm: Comm, in_flight: Sequence[Call], backwards: bool) -> list[list[Tensor]]:
    """Starts every call before the first is awaited, in order or the last first."""
    sent = [call.sent(comm.rank) for call in in_flight]
    before = [[x.clone() for x in xs] for xs in sent]
    ops = [call.op(comm.mesh, comm.rank) for call in in_flight]
    works = [comm.start(op, xs) for op, xs in zip(ops, sent, strict=True)]
    order = range(len(works))[::-1] if backwards else range(len(works))
    results = {i: works[i].wait() for i in order}
    for xs, kept in zip(sent, before, strict=True):
        assert all(map(torch.equal, xs, kept)), "an input was changed"
    return [results[i] for i in range(len(works))]


def specification(call: Call, mesh: Mesh, rank: int) -> list[Tensor]:
    """What a rank receives: slices concatenated, or numbers added, in fiber order."""
    fiber = call.fiber(mesh, rank)
    place, sent = fiber.index(rank), [call.sent(peer) for peer in fiber]
    results: list[Tensor] = []
    for column in zip(*sent, strict=True):
        if call.kind == "all_gather":
            results.append(torch.cat(column))
        elif call.kind == "all_to_all":
            starts = [sum(call.rows[peer][:place]) for peer in fiber]
            stops = [a + call.rows[peer][place] for a, peer in zip(starts, fiber, strict=True)]
            slices = [x[a:b] for x, a, b in zip(column, starts, stops, strict=True)]
            results.append(torch.cat(slices))
        else:
            total = column[0]
            for x in column[1:]:
                total = total + x
            rows = len(total) // len(fiber) if call.kind == "reduce_scatter" else 0
            results.append(total[place * rows : (place + 1) * rows] if rows else total)
    return results


def check_backend(in_flight: Sequence[Call], mesh: Mesh, found: list[list[list[Tensor]]]) -> None:
    """L6: what each rank received is the specification, bit by bit."""
    for rank, results in enumerate(found):
        for call, ys in zip(in_flight, results, strict=True):
            for y, expected in zip(ys, specification(call, mesh, rank), strict=True):
                assert y.dtype == expected.dtype and torch.equal(y, expected), (
                    f"L6 backends: {call} on rank {rank} of {mesh}: {y}, expected {expected}"
                )


def everywhere(mesh: Mesh, in_flight: Sequence[Call], backwards: bool) -> list[list[object]]:
    return [[in_flight] * mesh.size, [backwards] * mesh.size]


@given(data=st.data())
def test_simulated_ranks_follow_the_specification(data: st.DataObject) -> None:
    mesh = data.draw(meshes())
    in_flight = data.draw(st.lists(calls(mesh), min_size=1, max_size=3))
    arguments = everywhere(mesh, in_flight, data.draw(st.booleans()))
    check_backend(in_flight, mesh, simulate(program, mesh, *arguments))


def factorisations(ranks: int) -> st.SearchStrategy[Mesh]:
    """Meshes of exactly so many ranks."""
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return st.sampled_from([Mesh(edp=n, ep=ranks // n) for n in sizes])


def across_hosts(
    comm: Comm, in_flight: Sequence[Call], backwards: bool, hosts: Sequence[int]
) -> list[list[Tensor]]:
    """The same program, with ranks on as many hosts as are told apart: only gloo links those."""
    assert isinstance(comm, PairwiseComm)
    near = dict(comm.links)
    for peer in near:
        if hosts[peer] != hosts[comm.rank]:
            comm.links[peer] = GlooLink(peer, comm.timeout, comm.buffers)
    try:
        return program(comm, in_flight, backwards)
    finally:
        comm.links = near


@real(2)
@given(data=st.data())
@pytest.mark.parametrize("size", [2, 4])
def test_real_ranks_follow_the_specification(
    size: int, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    farm: Farm = request.getfixturevalue(f"ranks{size}")
    mesh = data.draw(factorisations(size))
    in_flight = data.draw(st.lists(calls(mesh), min_size=1, max_size=3))
    arguments = everywhere(mesh, in_flight, data.draw(st.booleans()))
    hosts = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    for each in ([0] * size, hosts):
        found = farm.run(across_hosts, mesh, *arguments, [each] * size)
        check_backend(in_flight, mesh, found)


@pytest.mark.parametrize("axes", [("edp", "ep"), ("ep", "edp"), ("ep",)])
@pytest.mark.parametrize("entries", [ONE_HOP // 4 - 100, ONE_HOP // 4 + 1])
def test_sums_around_the_size_from_which_they_take_two_hops(
    ranks4: Farm, axes: Axes, entries: int
) -> None:
    mesh = Mesh(edp=2, ep=2)
    tensors = [Tensors((n,), torch.float32) for n in (entries, 1, 0, 3)]
    large = Call("all_reduce", axes, (*tensors, Tensors((5, 3), torch.float64)))
    in_flight = [large, Call("all_gather", axes, tuple(tensors)), large._replace(seed=1)]
    for backwards, hosts in product((False, True), ([0] * 4, [0, 0, 1, 1], [0, 1, 2, 3])):
        arguments = everywhere(mesh, in_flight, backwards)
        found = ranks4.run(across_hosts, mesh, *arguments, [hosts] * 4)
        check_backend(in_flight, mesh, found)


# -- planted -------------------------------------------------------------------------------------

GATHER = Call("all_gather", ("ep", "edp"), (Tensors((2,), torch.float32),))
SUM = Call("all_reduce", ("ep", "edp"), (Tensors((50,), torch.float32),))


def test_another_order_of_adding_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, right = Mesh(edp=2, ep=2), sharding.specification.ordered_sum
    found = simulate(program, mesh, *everywhere(mesh, [SUM], False))
    check_backend([SUM], mesh, found)
    monkeypatch.setattr(sharding.specification, "ordered_sum", lambda xs: right(xs[::-1]))
    wrong = simulate(program, mesh, *everywhere(mesh, [SUM], False))
    torch.testing.assert_close(wrong, found)  # a tolerance would not have seen it
    with pytest.raises(AssertionError):
        check_backend([SUM], mesh, wrong)


def test_another_fiber_order_is_rejected() -> None:
    mesh = Mesh(edp=2, ep=2)
    ascending = GATHER._replace(axes=("edp", "ep"))
    with pytest.raises(AssertionError):
        check_backend(
            [GATHER], mesh, simulate(program, mesh, *everywhere(mesh, [ascending], False))
        )
