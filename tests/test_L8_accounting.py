"""L8: compute, store and copies partition the mesh axes; anything but axis names is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

from sharding import (
    Comm,
    Mesh,
    Rule,
    expert_parallel,
    interval,
    make_plan,
    replicated,
    simulate,
    zero3,
)
from sharding.collectives import all_gather, all_to_all, psum, pvary, reduce_scatter
from sharding.rule import Shape
from sharding.testing import Case, Functions, cases, check_accounting, counterexample

MESH = Mesh(edp=2, ep=2)


@given(cases())
def test_compute_store_and_copies_partition_the_axes(case: Case) -> None:
    check_accounting(case)


def test_the_named_rules_are_the_tuples_they_stand_for() -> None:
    assert zero3("edp", "ep") == Rule(store=("edp", "ep"))
    assert expert_parallel("ep", store=("edp",)) == Rule(("ep",), ("edp",))
    assert expert_parallel("ep") == Rule(("ep",))
    assert replicated() == Rule()


def test_copies_that_leave_out_an_axis_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rule, "copies", lambda rule, mesh: mesh.rest(rule.axes)[1:])
    assert counterexample(check_accounting, Functions())


def test_copies_with_other_intervals_are_rejected() -> None:
    def by_rank(rule: Rule, mesh: Mesh, rank: int, shape: Shape) -> tuple[int, int]:
        return interval(Rule(store=mesh.axes), mesh, rank, shape)

    assert counterexample(check_accounting, Functions(interval=by_rank))


NOT_AXES = [
    (True, TypeError, "tuple of axis names"),
    (None, TypeError, "tuple of axis names"),
    (0, TypeError, "tuple of axis names"),
    ("ep", TypeError, r"write \('ep',\)"),
    (["ep"], TypeError, "tuple of axis names"),
    (("tp",), ValueError, r"'tp' is not on Mesh\(edp=2, ep=2\): name axes among 'edp', 'ep'"),
    (("ep", "ep"), ValueError, "'ep' is named twice"),
    ((True,), (TypeError, ValueError), "tuple of axis names|True is not on"),
    ((0,), (TypeError, ValueError), "tuple of axis names|0 is not on"),
]


@pytest.mark.parametrize(("axes", "error", "message"), NOT_AXES)
@pytest.mark.parametrize("role", ["compute", "store"])
def test_a_rule_takes_axis_names_only(role: str, axes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make_plan(torch.zeros(4), "w", {"w": Rule(**{role: axes})}, MESH)


@pytest.mark.parametrize(("axes", "error", "message"), NOT_AXES)
@pytest.mark.parametrize("collective", [all_gather, reduce_scatter, psum, pvary, all_to_all])
def test_a_collective_takes_axis_names_only(
    collective: Any, axes: Any, error: Any, message: str
) -> None:
    def program(comm: Comm) -> None:
        splits = ([1, 1], [1, 1]) if collective is all_to_all else ()
        collective(torch.zeros(2), axes, comm, *splits)

    with pytest.raises(error, match=message):
        simulate(program, MESH)


@pytest.mark.parametrize(("axes", "error", "message"), NOT_AXES)
@pytest.mark.parametrize("ask", ["count", "rest", "fiber", "index"])
def test_a_mesh_takes_axis_names_only(ask: str, axes: Any, error: Any, message: str) -> None:
    arguments = (0, axes) if ask in ("fiber", "index") else (axes,)
    with pytest.raises(error, match=message):
        getattr(MESH, ask)(*arguments)
