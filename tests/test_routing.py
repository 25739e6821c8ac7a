"""Routing: the choice of experts, counts, and auxiliary losses that are the same on every mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from budget import one_in
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import (
    Case,
    assert_each_close,
    assert_same,
    cases,
    counterexample,
    make_batch,
    normal,
)
from torch import Tensor

from functional_ep.moe import dispatch
from functional_ep.routing import Routing, balance_loss, count_experts, route, statistics
from sharding import Comm, Mesh, simulate
from sharding.collectives import psum
from sharding.testing import seeds


class Sizes(NamedTuple):
    tokens: int
    experts: int
    choices: int
    seed: int

    @property
    def logits_TE(self) -> Tensor:
        return 2 * normal((self.tokens, self.experts), self.seed)

    @property
    def valid_T(self) -> Tensor:
        return normal((self.tokens,), self.seed + 1) > 0


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Any number of tokens down to none, K up to E."""
    experts = draw(st.integers(1, 6))
    return Sizes(draw(st.integers(0, 5)), experts, draw(st.integers(1, experts)), draw(seeds()))


# -- route ---------------------------------------------------------------------------------------


def choose(logits_E: Tensor, choices: int, normalise: bool) -> tuple[list[int], Tensor]:
    """One token's choices, largest first, and their scores."""
    weights = logits_E.exp()
    ids = sorted(range(len(logits_E)), key=lambda e: -float(logits_E[e].detach()))[:choices]
    total = weights[ids].sum() if normalise else weights.sum()
    return ids, weights[ids] / total


@given(sizes(), st.booleans())
def test_route_chooses_the_largest_and_weighs_them(case: Sizes, normalise: bool) -> None:
    routing = route(case.logits_TE, case.choices, normalise)
    chosen = [choose(row, case.choices, normalise) for row in case.logits_TE]
    assert routing.ids_TK.tolist() == [ids for ids, _ in chosen]
    assert_each_close(list(routing.scores_TK), [scores for _, scores in chosen])
    assert_each_close(
        [routing.probs_TE], [case.logits_TE.exp() / case.logits_TE.exp().sum(-1, True)]
    )
    assert torch.equal(routing.logits_TE, case.logits_TE)
    assert routing.scores_TK.shape == (case.tokens, case.choices)


@given(sizes(), st.booleans())
def test_the_gradient_of_scores_is_that_of_the_softmax(case: Sizes, normalise: bool) -> None:
    g_TK = normal((case.tokens, case.choices), case.seed + 2)

    def by_token(logits_TE: Tensor) -> Tensor:
        rows = [choose(row, case.choices, normalise)[1] for row in logits_TE]
        return torch.stack(rows) if rows else logits_TE[:, : case.choices]

    def scores(logits_TE: Tensor) -> Tensor:
        return route(logits_TE, case.choices, normalise).scores_TK

    found, expected = (torch.func.vjp(f, case.logits_TE)[1](g_TK) for f in (scores, by_token))
    assert_each_close(found, expected)


def test_a_score_of_another_sum_is_rejected() -> None:
    case = Sizes(3, 4, 2, 0)
    for normalise in (False, True):
        found = route(case.logits_TE, 2, normalise).scores_TK
        wrong = torch.stack([choose(row, 2, not normalise)[1] for row in case.logits_TE])
        with pytest.raises(AssertionError):
            assert_each_close([found], [wrong])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    logits_TE = Sizes(16, 8, 2, 0).logits_TE.to(dtype)
    found, expected = route(logits_TE, 2), route(logits_TE.float(), 2)
    assert_same(found, expected)
    assert found.scores_TK.dtype == found.probs_TE.dtype == torch.float32
    assert not torch.equal(logits_TE.softmax(-1).float(), found.probs_TE)


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"top-{k} of 3 experts: choose k from 1 to 3"):
        route(torch.zeros(2, 3), k)


# -- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, -7, 3, 9])
def test_ids_out_of_range_are_refused(bad: int) -> None:
    ids_TK, x_TD = torch.tensor([[0, 1], [bad, 2]]), torch.zeros(2, 1)
    message = f"^expert id {bad}: ids are 0 to 2"
    with pytest.raises(ValueError, match=message):
        count_experts(ids_TK, 3)
    with pytest.raises(ValueError, match=message):
        torch.vmap(lambda ids_TK: count_experts(ids_TK, 3))(ids_TK[None])
    with pytest.raises(ValueError, match=message):
        simulate(lambda comm: dispatch(x_TD, ids_TK, 3, ("ep",), comm), Mesh(ep=3))


def test_experts_that_do_not_divide_by_the_ranks_are_refused() -> None:
    def program(comm: Comm) -> None:
        dispatch(torch.zeros(1, 1), torch.tensor([[0]]), 3, ("ep",), comm)

    with pytest.raises(ValueError, match="3 experts do not divide by the 2 ranks"):
        simulate(program, Mesh(ep=2))


@given(sizes(), st.integers(1, 3))
def test_counts_may_differ_from_lane_to_lane(case: Sizes, lanes: int) -> None:
    shape = (lanes, case.tokens, case.choices)
    ids_BTK = torch.randint(case.experts, shape, generator=torch.Generator().manual_seed(case.seed))
    counts_BE = torch.vmap(lambda ids_TK: count_experts(ids_TK, case.experts))(ids_BTK)
    expected = [[int((ids == e).sum()) for e in range(case.experts)] for ids in ids_BTK]
    assert counts_BE.tolist() == expected


# -- statistics ----------------------------------------------------------------------------------


def take(routing: Routing, keep: Tensor) -> Routing:
    return Routing(*(x[keep] for x in routing))


@given(sizes())
def test_statistics_are_sums_over_tokens(case: Sizes) -> None:
    routing = route(case.logits_TE, case.choices)
    counts_E, probs_E, z = statistics(routing)
    assert counts_E.tolist() == [int((routing.ids_TK == e).sum()) for e in range(case.experts)]
    z_T = [row.exp().sum().log() ** 2 for row in case.logits_TE]
    assert_each_close([probs_E, z], [sum_of(routing.probs_TE), torch.tensor(z_T).double().sum()])


def sum_of(xs_TE: Tensor) -> Tensor:
    total = torch.zeros(xs_TE.shape[1], dtype=torch.float64)
    for x_E in xs_TE:
        total = total + x_E
    return total


@given(sizes())
def test_statistics_leave_padding_out(case: Sizes) -> None:
    routing = route(case.logits_TE, case.choices)
    found, expected = statistics(routing, case.valid_T), statistics(take(routing, case.valid_T))
    assert torch.equal(found.counts_E, expected.counts_E)
    assert_each_close(found[1:], expected[1:])


def test_statistics_of_padding_too_are_rejected() -> None:
    case = Sizes(5, 4, 2, 0)
    assert 0 < case.valid_T.sum() < 5
    routing = route(case.logits_TE, 2)
    for found, expected in zip(
        statistics(routing), statistics(take(routing, case.valid_T)), strict=True
    ):
        assert not torch.allclose(found, expected)


# -- auxiliary losses on a mesh ------------------------------------------------------------------


def switch_loss(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Switch Transformers, eq. 4 to 6, over the whole batch: ``E sum_e f_e P_e``."""
    tokens, experts = probs_TE.shape
    f_E = torch.stack([(ids_TK == e).double().mean() for e in range(experts)])
    return experts * (f_E * probs_TE.sum(0) / tokens).sum()


def local_counts(counts_E: Tensor, comm: Comm) -> Tensor:
    return counts_E


def global_counts(counts_E: Tensor, comm: Comm) -> Tensor:
    return psum(counts_E, comm.mesh.axes, comm)


def check_balance(case: Case, counts: Callable[[Tensor, Comm], Tensor] = global_counts) -> None:
    """Values and gradients of both losses on the mesh are those of one process."""
    x_TD, router = make_batch(case).x_TD, normal((case.experts, case.dim), case.seed + 6)

    def losses(router: Tensor, x_TD: Tensor, comm: Comm | None) -> tuple[Tensor, Tensor]:
        routing = route(x_TD @ router.T, case.choices)
        seen = statistics(routing)
        if comm is None:
            z = torch.stack([row.exp().sum().log() ** 2 for row in x_TD @ router.T]).mean()
            return switch_loss(routing.probs_TE, routing.ids_TK), z
        tokens = max(1, sum(case.tokens))
        balance = balance_loss(seen.probs_E, counts(seen.counts_E, comm))
        return balance / tokens, seen.z / tokens

    def program(comm: Comm, x_TD: Tensor) -> list[Tensor]:
        return gradients(lambda router: losses(router, x_TD, comm), router)

    parts = simulate(program, case.mesh, x_TD.split(case.tokens))
    found = [torch.stack(column).sum(0) for column in zip(*parts, strict=True)]
    if any(case.tokens):
        assert_each_close(found, gradients(lambda router: losses(router, x_TD, None), router))
    else:
        assert not any(x.any() for x in found)


def gradients(f: Callable[[Tensor], tuple[Tensor, Tensor]], router: Tensor) -> list[Tensor]:
    """Two losses and the gradient of each."""
    one, zero = torch.ones(()).double(), torch.zeros(()).double()
    values, pull = torch.func.vjp(f, router)[:2]
    return [*values, *pull((one, zero)), *pull((zero, one))]


@one_in(2)
@given(cases())
def test_auxiliary_losses_and_gradients_are_those_of_one_process(case: Case) -> None:
    check_balance(case)


def test_local_fractions_are_rejected() -> None:
    assert counterexample(lambda case: check_balance(case, local_counts))


def test_balance_without_any_token_is_zero() -> None:
    none_E = torch.zeros(3, dtype=torch.int64)
    assert balance_loss(torch.zeros(3), none_E) == 0
