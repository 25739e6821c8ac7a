"""L2: ``unpartition(partition(x)) = x`` and ``partition(x) = pad(ravel(x)[lo:hi])``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharding import Comm, Mesh, Plan, Rule, partition, simulate, unpartition
from sharding.rule import Shape, interval
from sharding.testing import (
    Case,
    Functions,
    cases,
    check_round_trip,
    counterexample,
    exact_params,
    meshes,
    plans,
    seeds,
)


@given(cases())
def test_unpartition_inverts_partition(case: Case) -> None:
    check_round_trip(case)


@given(st.data())
def test_full_inverts_shard_on_every_rank(data: st.DataObject) -> None:
    plan: Plan = data.draw(meshes().flatmap(plans))
    params = exact_params(plan, data.draw(seeds()))

    def program(comm: Comm) -> list[Tensor]:
        return plan.full(plan.shard(params, comm), comm)

    for whole in simulate(program, plan.mesh):
        assert all(map(torch.equal, whole, params))


@given(st.data(), st.booleans())
def test_the_transpose_of_full_is_the_shard_of_the_sum(data: st.DataObject, plainly: bool) -> None:
    """``vjp(full)(c_r) = shard(sum over ranks of c)``, and full is its own tangent."""
    plan: Plan = data.draw(meshes().flatmap(plans))
    seed = data.draw(seeds())
    cotangents = [exact_params(plan, seed + rank) for rank in plan.mesh]
    floating = [i for i, leaf in enumerate(plan.leaves) if leaf.dtype.is_floating_point]
    total = [sum(each[i] for each in cotangents) for i in floating]
    tree = plan.at([plan.leaves[i] for i in floating])

    def program(comm: Comm, mine: list[Tensor]) -> None:
        shards = tree.shard([mine[i] for i in floating], comm)
        whole, pull, *_ = torch.func.vjp(lambda *xs: tree.full(list(xs), comm), *shards)
        found: Sequence[Tensor] = pull([mine[i] for i in floating])
        if plainly and floating:
            leaves = [x.clone().requires_grad_() for x in shards]
            found = torch.autograd.grad(
                tree.full(leaves, comm), leaves, [mine[i] for i in floating]
            )
        assert all(map(torch.equal, found, tree.shard(total, comm)))
        moved = torch.func.jvp(lambda *xs: tree.full(list(xs), comm), tuple(shards), tuple(shards))
        assert all(map(torch.equal, moved[1], whole))

    simulate(program, plan.mesh, cotangents)


@given(cases())
def test_the_transpose_of_shard_is_what_the_rank_has_of_it(case: Case) -> None:
    for rank in case.mesh:
        x = torch.ones(case.shape, dtype=torch.float64)
        shard, pull, *_ = torch.func.vjp(lambda x, r=rank: partition(case.rule, case.mesh, r, x), x)
        lo, hi = interval(case.rule, case.mesh, rank, case.shape)
        expected = torch.zeros(x.numel(), dtype=x.dtype)
        expected[lo:hi] = 2.0
        assert torch.equal(pull(torch.full_like(shard, 2.0))[0].reshape(-1), expected)


def test_shards_of_what_was_computed_lead_back_to_it() -> None:
    """And those of a leaf of autograd's are leaves: they are what is trained."""
    w = torch.ones(4, requires_grad=True)
    shard = partition(Rule(store=("edp",)), Mesh(edp=2), 1, 3 * w)
    shard.sum().backward()
    assert w.grad is not None and torch.equal(w.grad, torch.tensor([0.0, 0.0, 3.0, 3.0]))
    assert not partition(Rule(store=("edp",)), Mesh(edp=2), 1, w).requires_grad


def pads_in_front(rule: Rule, mesh: Mesh, rank: int, x: Tensor) -> Tensor:
    return partition(rule, mesh, rank, x).flip(0)


def pads_with_ones(rule: Rule, mesh: Mesh, rank: int, x: Tensor) -> Tensor:
    outside = 1 - partition(rule, mesh, rank, torch.ones_like(x))
    return partition(rule, mesh, rank, x) + outside


def gives_everything_to_all(rule: Rule, mesh: Mesh, rank: int, x: Tensor) -> Tensor:
    return x.reshape(-1).clone()


def concatenates_in_rank_order(
    rule: Rule, mesh: Mesh, shards: Sequence[Tensor], shape: Shape
) -> Tensor:
    flat = torch.cat(list(shards))
    return flat[: unpartition(rule, mesh, shards, shape).numel()].view(shape)


@pytest.mark.parametrize(
    "functions",
    [
        Functions(partition=pads_in_front),
        Functions(partition=pads_with_ones),
        Functions(partition=gives_everything_to_all),
        Functions(unpartition=concatenates_in_rank_order),
    ],
)
def test_a_wrong_partition_is_rejected(functions: Functions) -> None:
    assert counterexample(check_round_trip, functions)
