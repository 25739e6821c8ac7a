"""M8: idle experts get exactly zero gradient; idle ranks take part in every collective."""

from __future__ import annotations

import moe_mutants
import pytest
import torch
from budget import one_in
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import (
    Case,
    Moe,
    Weights,
    assert_each_close,
    assert_same,
    cases,
    counterexample,
    idle_experts,
    make_batch,
    make_weights,
    on_mesh,
    program,
)
from torch import Tensor

import functional_ep.moe
from functional_ep.routing import Routing
from sharding import Comm, Divergence, Mesh
from sharding.mesh import Axes
from sharding.testing import check_symmetry


def check_idle_experts(case: Case, moe: Moe = functional_ep.moe.moe) -> None:
    """M8: the gradient of an idle expert is zero, and its weights, here infinite, touch nothing."""
    batch, weights = make_batch(case), make_weights(case)
    idle = idle_experts(batch, case.experts)
    plain = on_mesh(case, batch, weights, moe)
    poisoned = {name: w.clone() for name, w in weights.items()}
    for w in poisoned.values():
        w[idle] = torch.inf
    found = on_mesh(case, batch, poisoned, moe)
    assert_same(found, plain)
    assert not any(g[idle].any() for g in found[3:])


@one_in(2)
@given(cases())
def test_idle_experts_get_zero_gradient_and_touch_nothing(case: Case) -> None:
    check_idle_experts(case)


def check_idle_ranks(case: Case, moe: Moe = functional_ep.moe.moe) -> None:
    """M8: all ranks start and await the same collectives, forward and backward."""
    batch, weights = make_batch(case), make_weights(case)
    events = check_symmetry(program(case, weights, moe), case.mesh, batch.split(case.tokens))
    travels = case.mesh.count(case.axes) > 1
    # Counts, rows there, rows back, and the cotangents of rows; each starts and is awaited.
    assert len(events) == (2 * (1 + 2 + 2) if travels else 0)


@st.composite
def nearly_empty(draw: st.DrawFn) -> Case:
    """No token on any rank, or none on any rank but one."""
    case = draw(cases())
    only, tokens = draw(st.integers(0, case.mesh.size - 1)), draw(st.integers(0, 3))
    return case._replace(tokens=tuple(tokens * (rank == only) for rank in case.mesh))


@one_in(2)
@given(st.one_of(cases(), nearly_empty()))
def test_idle_ranks_take_part_in_every_collective(case: Case) -> None:
    check_idle_ranks(case)


@one_in(2)
@given(nearly_empty())
def test_one_busy_rank_computes_what_it_computes_alone(case: Case) -> None:
    batch, weights = make_batch(case), make_weights(case)
    found = on_mesh(case, batch, weights)
    assert_each_close(found, on_mesh(case._replace(axes=()), batch, weights))
    if not any(case.tokens):
        assert not any(x.any() for x in found)


@pytest.mark.parametrize("mutant", [moe_mutants.touch_every_expert, moe_mutants.start_from_one])
def test_idle_experts_that_are_touched_are_rejected(mutant: Moe) -> None:
    assert counterexample(lambda case: check_idle_experts(case, mutant))


def test_a_rank_that_skips_is_rejected() -> None:
    def law(case: Case) -> None:
        try:
            check_idle_ranks(case, moe_mutants.skip_without_tokens)
        except Divergence as error:
            raise AssertionError from error

    assert 0 in counterexample(law).tokens


def test_an_exchange_more_on_some_ranks_is_rejected() -> None:
    """Fibers of other experts do not wait for it: it is no Divergence."""

    def twice_on_the_first_fiber(
        weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm
    ) -> Tensor:
        if 0 in comm.fiber(axes):
            comm.all_reduce([x_TD.sum()], axes)
        return functional_ep.moe.moe(weights, x_TD, routing, axes, comm)

    case = Case(Mesh(edp=2, ep=2), ("ep",), (1, 1, 1, 1), 2, 2, 1, 1, 1, seed=0)
    check_idle_ranks(case)
    with pytest.raises(AssertionError, match="T13 symmetry"):
        check_idle_ranks(case, twice_on_the_first_fiber)
