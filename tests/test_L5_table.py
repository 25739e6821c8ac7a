"""L5: the collectives, closed under every transform, are each the transpose of its partner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dense as oracle_module
import pytest
import torch
import transforms
from budget import one_in, real
from dense import KINDS, PARAMETERS, Sample, collective, dense, local, samples
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharding import Comm, Mesh, simulate
from sharding.collectives import Collective, Vary, _Start
from sharding.mesh import Axes
from sharding.testing import exact, meshes

Leaves = list[Tensor]
MESH = Mesh(edp=2, ep=2)
MESHES_OF_2 = [Mesh(ep=2), Mesh(edp=2, ep=1), Mesh(edp=1, ep=2)]


def parameters(sample: Sample, side: str, salt: int) -> Leaves:
    """A row of numbers for each rank and leaf; copies of one value have the row of their holder."""
    shape = (sample.mesh.size, PARAMETERS)
    drawn = [exact(shape, sample.seed + 1000 * salt + leaf) for leaf in sample.leaves]
    return [x[sample.holders(leaf, side)] for leaf, x in enumerate(drawn)]


def rows(leaves: Leaves, rank: int) -> Leaves:
    return [x[rank] for x in leaves]


def program(comm: Comm, sample: Sample, x: Leaves, u: Leaves, v: Leaves) -> dict[str, Any]:
    """Every transform of one rank's program."""
    f = local(sample, comm)
    results: dict[str, Any] = {k: t(f, x, u, v) for k, (_, t) in transforms.SHARED.items()}
    results |= transforms.local_matrices(f, x)
    plain = transforms.plain_autograd(f, x, u, v)
    return results | {f"autograd {name}": result for name, result in plain.items()}


def oracle(sample: Sample, x: Leaves, u: Leaves, v: Leaves) -> dict[str, tuple[str, Leaves]]:
    """The same for all ranks at once, with no collective; and which side each result is on."""
    f = dense(sample)
    results = {k: (side, t(f, x, u, v)) for k, (side, t) in transforms.SHARED.items()}
    return results | {f"autograd {name}": results[name] for name in ("vjp", "grad of grad")}


def matrices(sample: Sample, x: Leaves) -> dict[str, transforms.Matrices]:
    """Jacobians and Hessians of all ranks at once."""
    counts = [sample.counts_once(leaf, "output") for leaf in sample.leaves]
    ones = [c.expand(-1, PARAMETERS).contiguous() for c in counts]
    return transforms.dense_matrices(dense(sample), x, ones)


def check_table(sample: Sample, ranks: Any = simulate) -> None:
    """L5: every transform of a collective is that of the dense function, on every rank."""
    x, u, v = (parameters(sample, s, i) for i, s in enumerate(("input", "input", "output")))
    per_rank = [[rows(leaves, rank) for rank in sample.mesh] for leaves in (x, u, v)]
    found = ranks(program, sample.mesh, [sample] * sample.mesh.size, *per_rank)
    leafwise, pairwise = oracle(sample, x, u, v), matrices(sample, x)
    for rank, results in enumerate(found):
        for name, (side, expected) in leafwise.items():
            for leaf, whole in enumerate(expected):
                row = whole.select(-2, sample.holder(rank, leaf, side))
                _same(results[name][leaf], row, name, rank, sample)
        for name, (side, owner, pairs) in pairwise.items():
            for i, row in enumerate(pairs):
                for j, whole in enumerate(row):
                    holder = sample.holder(rank, i if owner == "row" else j, side)
                    _same(results[name][i][j], whole[holder], name, rank, sample)


def _same(found: Tensor, expected: Tensor, name: str, rank: int, sample: Sample) -> None:
    assert torch.equal(found, expected), (
        f"L5 table: {name} of {sample} on rank {rank}: found {found}, expected {expected}"
    )


@pytest.mark.parametrize("kind", KINDS)
@one_in(10)
@given(data=st.data())
def test_every_transform_of_a_collective_is_that_of_the_dense_function(
    kind: str, data: st.DataObject
) -> None:
    check_table(data.draw(meshes(4).flatmap(lambda mesh: samples(mesh, kind))))


@real(4)
@given(data=st.data())
def test_the_same_on_real_ranks(ranks2: Farm, data: st.DataObject) -> None:
    mesh, kind = data.draw(st.sampled_from(MESHES_OF_2)), data.draw(st.sampled_from(KINDS))
    check_table(data.draw(samples(mesh, kind)), ranks2.run)


# -- transposes ----------------------------------------------------------------------------------


def numbers(sample: Sample, side: str, salt: int) -> list[Leaves]:
    """What each rank puts in at one side, alike where ranks hold one value."""

    def draw(rank: int, leaf: int) -> Tensor:
        shape = getattr(sample, f"{side}_shape")(rank, leaf)
        return exact(shape, sample.seed + salt + 64 * leaf + sample.holder(rank, leaf, side))

    return [[draw(rank, leaf) for leaf in sample.leaves] for rank in sample.mesh]


def inner(sample: Sample, side: str, a: Sequence[Leaves], b: Sequence[Leaves]) -> Tensor:
    """The sum of products over ranks and leaves; copies of one value count once."""
    products = [
        (x * y).sum() * sample.counts_once(leaf, side)[rank]
        for rank in sample.mesh
        for leaf, (x, y) in enumerate(zip(a[rank], b[rank], strict=True))
    ]
    return torch.cat(products).sum()


def check_partner(sample: Sample) -> None:
    """L5: ``<collective(x), v> = <x, partner(v)>``, summed over all ranks."""
    partner, every = sample.partner(), [sample] * sample.mesh.size
    assert partner.partner() == sample
    x, v = numbers(sample, "input", 0), numbers(sample, "output", 1000)

    def apply(comm: Comm, sample: Sample, xs: Leaves) -> Leaves:
        return list(collective(sample, xs, comm))

    there = simulate(apply, sample.mesh, every, x)
    back = simulate(apply, sample.mesh, [partner] * sample.mesh.size, v)
    left, right = inner(sample, "output", there, v), inner(sample, "input", x, back)
    assert torch.equal(left, right), f"L5 partner: {left} is not {right} for {sample}"


@given(data=st.data())
def test_each_collective_is_the_transpose_of_its_partner(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    check_partner(data.draw(meshes().flatmap(lambda mesh: samples(mesh, kind))))


def check_forward_and_reverse(sample: Sample) -> None:
    """L5: ``<J u, v> = <u, J' v>``, with jvp on the left and vjp on the right."""
    x, u, v = (parameters(sample, s, i) for i, s in enumerate(("input", "input", "output")))

    def both(comm: Comm) -> tuple[Leaves, Leaves]:
        f, at, of_u, of_v = local(sample, comm), *(rows(a, comm.rank) for a in (x, u, v))
        return transforms.push(f, at, of_u), transforms.pull(f, at, of_v)

    pushed, pulled = zip(*simulate(both, sample.mesh), strict=True)
    left = inner(sample, "output", pushed, [rows(v, rank) for rank in sample.mesh])
    right = inner(sample, "input", [rows(u, rank) for rank in sample.mesh], pulled)
    assert torch.equal(left, right), f"L5 jvp and vjp: {left} is not {right} for {sample}"


@one_in(2)
@given(data=st.data())
def test_jvp_and_vjp_agree(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    check_forward_and_reverse(data.draw(meshes().flatmap(lambda mesh: samples(mesh, kind))))


# -- planted -------------------------------------------------------------------------------------

FIXED = {
    "psum": Sample("psum", MESH, ("ep",), (), ((5,),), (), 1),
    "pvary": Sample("pvary", MESH, ("ep",), (), ((5,),), (), 1),
    "all_gather": Sample("all_gather", MESH, ("ep",), (), ((5,),), (), 1),
    "all_to_all": Sample("all_to_all", MESH, ("ep",), (), ((2,),), ((0, 1), (2, 3)) * 2, 1),
}


def itself(linear: Any) -> Any:
    return linear


@pytest.mark.parametrize(
    ("kind", "row"), [("psum", Collective), ("pvary", Vary), ("all_to_all", Collective)]
)
def test_a_collective_that_is_its_own_transpose_is_rejected(
    kind: str, row: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row, "transpose", property(itself))
    for check in (check_table, check_forward_and_reverse):
        with pytest.raises((AssertionError, ValueError)):
            check(FIXED[kind])


@pytest.mark.parametrize("kind", ["psum", "all_gather"])
def test_a_tangent_that_is_zero_without_a_word_is_rejected(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zero(ctx: Any, *tangents: Any) -> Tensor:
        xs = [torch.zeros_like(x) for x in tangents[3:]]
        return _Start.apply(ctx.linear, ctx.comm, ctx.lanes, *xs)

    monkeypatch.setattr(_Start, "jvp", staticmethod(zero))
    for check in (check_table, check_forward_and_reverse):
        with pytest.raises(AssertionError):
            check(FIXED[kind])


@pytest.mark.parametrize("kind", ["psum", "all_gather"])
def test_a_batch_of_which_one_lane_travels_is_rejected(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Collective.start

    def first_lane(linear: Collective, xs: list[Tensor], comm: Comm) -> Any:
        return start(linear, [x[..., :1].expand(x.shape) for x in xs], comm)

    monkeypatch.setattr(Collective, "start", first_lane)
    with pytest.raises(AssertionError):
        check_table(FIXED[kind])


@pytest.mark.parametrize("kind", ["all_gather", "pvary"])
def test_an_average_instead_of_a_sum_is_rejected(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Any = getattr(oracle_module, {"pvary": "psum"}.get(kind, "reduce_scatter"))

    def average(x: Tensor, axes: Axes, comm: Comm) -> Tensor:
        return right(x, axes, comm) / comm.mesh.count(axes)

    monkeypatch.setattr(oracle_module, right.__name__, average)
    with pytest.raises(AssertionError):
        check_partner(FIXED[kind])
