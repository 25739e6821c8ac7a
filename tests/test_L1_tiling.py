"""L1: intervals of all ranks cover the leaf, each index exactly ``copies`` times."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given

from sharding import Mesh, Rule, interval
from sharding.rule import Shape, view_shape
from sharding.testing import Case, Functions, cases, check_tiling, counterexample


@given(cases())
def test_intervals_cover_the_leaf_once_per_copy(case: Case) -> None:
    check_tiling(case)


def ends_one_early(rule: Rule, mesh: Mesh, rank: int, shape: Shape) -> tuple[int, int]:
    lo, hi = interval(rule, mesh, rank, shape)
    return lo, max(lo, hi - 1)


def rounds_down(rule: Rule, mesh: Mesh, rank: int, shape: Shape) -> tuple[int, int]:
    size = math.prod(view_shape(rule, mesh, shape))
    shard = size // mesh.count(rule.store)
    lo = mesh.index(rank, rule.compute) * size + mesh.index(rank, rule.store) * shard
    return lo, lo + shard


def includes_padding(rule: Rule, mesh: Mesh, rank: int, shape: Shape) -> tuple[int, int]:
    lo, _ = interval(rule, mesh, rank, shape)
    return lo, lo + -(-math.prod(view_shape(rule, mesh, shape)) // mesh.count(rule.store))


def forgets_compute(rule: Rule, mesh: Mesh, rank: int, shape: Shape) -> tuple[int, int]:
    return interval(rule, mesh, mesh.fiber(rank, rule.compute)[0], shape)


def takes_the_rank_for_its_place(
    rule: Rule, mesh: Mesh, rank: int, shape: Shape
) -> tuple[int, int]:
    return interval(rule, mesh, rank % mesh.count(rule.axes), shape)


@pytest.mark.parametrize(
    "mutant",
    [
        ends_one_early,
        rounds_down,
        includes_padding,
        forgets_compute,
        takes_the_rank_for_its_place,
    ],
)
def test_a_wrong_interval_is_rejected(mutant: Callable[..., tuple[int, int]]) -> None:
    assert counterexample(check_tiling, Functions(interval=mutant))
