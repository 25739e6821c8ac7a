"""L9: inputs stay as they are; same inputs, same outputs; shards are memory of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sharding import Comm, Mesh, Rule, partition, unpartition
from sharding.gather import Layout, gather, reduce
from sharding.rule import Shape
from sharding.testing import Case, Functions, cases, check_purity, counterexample


@given(cases())
def test_moving_a_leaf_is_pure(case: Case) -> None:
    check_purity(case)


def aliases(rule: Rule, mesh: Mesh, rank: int, x: Tensor) -> Tensor:
    return partition(rule, mesh, rank, x) if rule.axes else x.reshape(-1)


def clears_the_leaf(rule: Rule, mesh: Mesh, rank: int, x: Tensor) -> Tensor:
    shard = partition(rule, mesh, rank, x)
    x.zero_()
    return shard


def draws_at_random(rule: Rule, mesh: Mesh, rank: int, x: Tensor) -> Tensor:
    return torch.rand_like(partition(rule, mesh, rank, x))


def clears_a_shard(rule: Rule, mesh: Mesh, shards: Sequence[Tensor], shape: Shape) -> Tensor:
    whole = unpartition(rule, mesh, shards, shape)
    shards[-1].zero_()
    return whole


def clears_its_shards(layouts: Sequence[Layout], shards: Sequence[Tensor], comm: Comm) -> Any:
    views = [view.clone() for view in gather(layouts, shards, comm)]
    shards[0].zero_()
    return views


def clears_its_gradients(layouts: Sequence[Layout], grads: Sequence[Tensor], comm: Comm) -> Any:
    reduced = [g.clone() for g in reduce(layouts, grads, comm)]
    grads[0].zero_()
    return reduced


@pytest.mark.parametrize(
    "functions",
    [
        Functions(partition=aliases),
        Functions(partition=clears_the_leaf),
        Functions(partition=draws_at_random),
        Functions(unpartition=clears_a_shard),
        Functions(gather=clears_its_shards),
        Functions(reduce=clears_its_gradients),
    ],
)
def test_an_impure_function_is_rejected(functions: Functions) -> None:
    assert counterexample(check_purity, functions)
