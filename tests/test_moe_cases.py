"""The strategy of the MoE laws reaches the hard cases; its reference agrees with a formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from moe_cases import (
    Case,
    assert_each_close,
    cases,
    dense_moe,
    find_case,
    idle_experts,
    make_batch,
    make_weights,
    sum_over_experts,
)

HARD: dict[str, Callable[[Case], bool]] = {
    "experts split and copied at once": lambda c: 1 < c.mesh.count(c.axes) < c.mesh.size,
    "two expert axes": lambda c: ranks_along(c) > 1 and c.axes == c.mesh.axes,
    "two expert axes in the other order": lambda c: ranks_along(c) > 1 and c.axes != c.mesh.axes,
    "no expert axis on many ranks": lambda c: c.mesh.size > 2 and not c.axes,
    "several experts per rank": lambda c: c.local > 1 and c.mesh.count(c.axes) > 1,
    "an idle rank": lambda c: 0 in c.tokens and any(c.tokens),
    "all ranks idle but one": lambda c: c.mesh.size > 2 and sum(t > 0 for t in c.tokens) == 1,
    "no token": lambda c: not any(c.tokens) and c.mesh.size > 1,
    "an idle expert": lambda c: any(c.tokens) and bool(idle_experts(make_batch(c), c.experts)),
    "an idle rank of experts": lambda c: any(c.tokens) and c.busy == 1 < c.mesh.count(c.axes),
    "K = E": lambda c: c.choices == c.experts > 1,
    "uneven tokens": lambda c: len(set(c.tokens)) > 2,
}


def ranks_along(case: Case) -> int:
    """The ranks along the shorter of two expert axes; none if there are not two."""
    return min(case.mesh[axis] for axis in case.axes) if len(case.axes) == 2 else 0


@pytest.mark.parametrize("name", HARD)
def test_hard_cases_are_drawn(name: str) -> None:
    assert find_case(HARD[name])


@given(cases(max_ranks=2))
def test_the_dense_reference_agrees_with_the_sum_over_all_experts(case: Case) -> None:
    (x_TD, ids_TK, scores_TK, _), weights = make_batch(case), make_weights(case)
    found = dense_moe(weights["gate_up"], weights["down"], x_TD, ids_TK, scores_TK)
    expected = sum_over_experts(weights["gate_up"], weights["down"], x_TD, ids_TK, scores_TK)
    assert_each_close([found], [expected])
