"""L2: ``unpartition(partition(x)) = x`` and ``partition(x) = pad(ravel(x)[lo:hi])``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharding import Comm, Mesh, Plan, Rule, partition, simulate, unpartition
from sharding.rule import Shape
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
