"""Routing: the choice of experts, its weights and gradients, and counts of choices."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import (
    assert_each_close,
    assert_same,
    normal,
)
from torch import Tensor

from functional_ep.moe import dispatch
from functional_ep.routing import count_experts, route
from sharding import Comm, Mesh, simulate
from sharding.testing import seeds


class Sizes(NamedTuple):
    tokens: int
    experts: int
    choices: int
    seed: int

    @property
    def logits_TE(self) -> Tensor:
        return 2 * normal((self.tokens, self.experts), self.seed)


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


@pytest.mark.parametrize(
    ("x_TD", "ids_TK", "message"),
    [
        (torch.zeros(6, 3), torch.zeros(5, 2).long(), r"tokens \(6, 3\) and ids \(5, 2\), which"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 2).long(), r"tokens \(2, 3, 3\) and ids"),
        (torch.zeros(2, 3), torch.zeros(2).long(), r"and ids \(2,\), which have to be \(T, D\)"),
        (torch.zeros(2, 3), torch.zeros(2, 2), r"ids are torch.float32, and have to be integers"),
    ],
)
def test_tokens_and_ids_that_do_not_fit_are_refused(
    x_TD: torch.Tensor, ids_TK: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(lambda comm: dispatch(x_TD, ids_TK, 3, (), comm), Mesh())


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
