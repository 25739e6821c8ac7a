"""M5: permuting tokens, also from rank to rank, permutes their outputs and gradients."""

from __future__ import annotations

import moe_mutants
import pytest
import torch
from budget import one_in
from hypothesis import given
from moe_cases import (
    Batch,
    Case,
    Moe,
    Outcome,
    assert_each_close,
    cases,
    counterexample,
    make_batch,
    make_weights,
    on_mesh,
)
from moe_mutants import composed, rerouted
from torch import Tensor

import functional_ep.moe


def check_tokens(case: Case, moe: Moe = functional_ep.moe.moe) -> None:
    """M5: tokens are dealt out anew, other numbers of them to each rank."""
    batch, weights = make_batch(case), make_weights(case)
    before = on_mesh(case, batch, weights, moe)
    stream = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(sum(case.tokens), generator=stream)
    ranks = torch.randint(case.mesh.size, order.shape, generator=stream)
    elsewhere = case._replace(tokens=tuple(ranks.bincount(minlength=case.mesh.size).tolist()))
    after = on_mesh(elsewhere, Batch(*(x[order] for x in batch)), weights, moe)
    assert_each_close(after, permute_tokens(before, order))


def permute_tokens(outcome: Outcome, order: Tensor) -> Outcome:
    """Rows of tokens permuted; experts untouched."""
    y_TD, x_TD, scores_TK, gate_up, down = outcome
    return Outcome(y_TD[order], x_TD[order], scores_TK[order], gate_up, down)


@one_in(2)
@given(cases())
def test_tokens_may_be_dealt_out_in_any_way(case: Case) -> None:
    check_tokens(case)


@pytest.mark.parametrize(
    "mutant",
    [
        composed(combine=moe_mutants.combine_by_the_permutation),
        composed(combine=moe_mutants.combine_with_unsorted_scores),
        rerouted(moe_mutants.count_from_ones_own_experts),
    ],
    ids=["permutation", "unsorted scores", "own experts first"],
)
def test_a_mixture_that_depends_on_places_is_rejected(mutant: Moe) -> None:
    assert counterexample(lambda case: check_tokens(case, mutant))
