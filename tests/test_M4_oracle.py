"""M4: a mixture of experts on any mesh is the dense sum over choices of score times expert.

Values and gradients: of the tokens, the scores, the router and every expert, wherever it is held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import moe_mutants
import pytest
import torch
from budget import one_in
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import (
    Case,
    Moe,
    as_routing,
    assert_each_close,
    assert_same,
    cases,
    counterexample,
    dense_moe,
    densely,
    make_batch,
    make_weights,
    normal,
    on_mesh,
    program,
)
from moe_mutants import composed, rerouted
from torch import Tensor

import functional_ep.moe
from functional_ep.routing import route
from sharding import Comm, simulate


def check_oracle(case: Case, moe: Moe = functional_ep.moe.moe) -> None:
    """M4 for scores that are given."""
    batch, weights = make_batch(case), make_weights(case)
    assert_each_close(on_mesh(case, batch, weights, moe), densely(batch, weights))


@given(cases())
def test_outputs_and_gradients_are_those_of_the_dense_reference(case: Case) -> None:
    check_oracle(case)


@one_in(4)
@given(cases())
def test_plain_autograd_gives_the_same_bits(case: Case) -> None:
    batch, weights = make_batch(case), make_weights(case)

    def plainly(comm: Comm, xs: tuple[Tensor, ...]) -> list[Tensor]:
        x_TD, ids_TK, scores_TK, g_TD = xs
        held = {name: w[case.held(comm.rank)] for name, w in weights.items()}
        view = {name: w.detach().requires_grad_() for name, w in held.items()}
        leaves = [x.detach().requires_grad_() for x in (x_TD, scores_TK)]
        routing = as_routing(ids_TK, leaves[1], case.experts)
        y_TD = functional_ep.moe.moe(view, leaves[0], routing, case.axes, comm)
        return [y_TD, *torch.autograd.grad(y_TD, [*leaves, *view.values()], g_TD)]

    split = batch.split(case.tokens)
    for (*ours, view), plain in zip(
        simulate(program(case, weights, functional_ep.moe.moe), case.mesh, split),
        simulate(plainly, case.mesh, split),
        strict=True,
    ):
        assert_same([*ours, *view.values()], plain)


class Routed(NamedTuple):
    """The output of a mixture with a router; gradients of the tokens and of the router."""

    y_TD: Tensor
    x_TD: Tensor
    router: Tensor


def check_router(case: Case, normalise: bool, moe: Moe = functional_ep.moe.moe) -> None:
    """M4 for scores that a router makes; idle experts have a logit of minus infinity."""
    batch, weights = make_batch(case), make_weights(case)
    router, g_TD = normal((case.experts, case.dim), case.seed + 6), batch.g_TD
    closed_E = torch.zeros(case.experts, dtype=torch.float64)
    closed_E[case.busy :] = -torch.inf

    def local(comm: Comm, x_TD: Tensor, g_TD: Tensor) -> Routed:
        def f(x_TD: Tensor, router: Tensor) -> Tensor:
            routing = route(x_TD @ router.T + closed_E, case.choices, normalise)
            return moe(view, x_TD, routing, case.axes, comm)

        view = {name: w[case.held(comm.rank)] for name, w in weights.items()}
        y_TD, pull = torch.func.vjp(f, x_TD, router)[:2]
        return Routed(y_TD, *pull(g_TD))

    def dense(x_TD: Tensor, router: Tensor) -> Tensor:
        weight_TE = (x_TD @ router.T + closed_E).exp()
        ids_TK = weight_TE.argsort(-1, descending=True)[:, : case.choices]
        scores_TK = weight_TE.gather(1, ids_TK)
        total_T1 = (scores_TK if normalise else weight_TE).sum(1, keepdim=True)
        return dense_moe(weights["gate_up"], weights["down"], x_TD, ids_TK, scores_TK / total_T1)

    xs, gs = batch.x_TD.split(case.tokens), g_TD.split(case.tokens)
    y, dx, d_router = zip(*simulate(local, case.mesh, xs, gs), strict=True)
    found = Routed(torch.cat(y), torch.cat(dx), torch.stack(d_router).sum(0))
    y_TD, pull = torch.func.vjp(dense, batch.x_TD, router)[:2]
    assert_each_close(found, Routed(y_TD, *pull(g_TD)))


@one_in(2)
@given(cases(), st.booleans())
def test_the_routers_gradient_is_that_of_the_dense_reference(case: Case, normalise: bool) -> None:
    check_router(case, normalise)


@pytest.mark.parametrize(
    "mutant",
    [
        composed(combine=moe_mutants.combine_by_the_permutation),
        composed(combine=moe_mutants.combine_with_unsorted_scores),
        composed(combine=moe_mutants.combine_without_scores),
        composed(combine=moe_mutants.combine_with_constant_scores),
        composed(dispatch=moe_mutants.dispatch_constants),
        composed(dispatch=moe_mutants.leave_rows_as_they_came),
        moe_mutants.scale_expert_gradients,
        moe_mutants.number_axes_backwards,
        rerouted(moe_mutants.deal_experts_out),
        rerouted(moe_mutants.count_from_ones_own_experts),
        rerouted(moe_mutants.forget_the_last_expert),
    ],
    ids=[
        *("permutation", "unsorted scores", "no scores"),
        *("constant scores", "constant tokens", "order of arrival", "expert gradient x ep"),
        *("axes", "round robin", "own experts first", "last expert"),
    ],
)
def test_a_wrong_mixture_is_rejected(mutant: Moe) -> None:
    assert counterexample(lambda case: check_oracle(case, mutant))


@pytest.mark.parametrize(
    "law",
    [
        lambda case: check_router(
            case, True, composed(combine=moe_mutants.combine_with_constant_scores)
        ),
        lambda case: check_router(case, False, rerouted(moe_mutants.forget_the_last_expert)),
    ],
)
def test_a_router_that_learns_nothing_or_is_misunderstood_is_rejected(
    law: Callable[[Case], None],
) -> None:
    assert counterexample(law)
