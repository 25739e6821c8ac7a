"""M7: giving experts other names, and so other ranks, changes nothing but where gradients are."""

from __future__ import annotations

import moe_mutants
import pytest
import torch
from hypothesis import given
from moe_cases import (
    Case,
    Moe,
    assert_each_close,
    cases,
    counterexample,
    make_batch,
    make_weights,
    on_mesh,
)
from moe_mutants import composed, rerouted

import functional_ep.moe


def check_names(case: Case, moe: Moe = functional_ep.moe.moe) -> None:
    """M7: expert e is called ``name[e]``."""
    batch, weights = make_batch(case), make_weights(case)
    stream = torch.Generator().manual_seed(case.seed)
    name = torch.randperm(case.experts, generator=stream)
    moved = {leaf: w[name.argsort()] for leaf, w in weights.items()}
    before = on_mesh(case, batch, weights, moe)
    after = on_mesh(case, batch._replace(ids_TK=name[batch.ids_TK]), moved, moe)
    assert_each_close(after[:3], before[:3])
    assert_each_close([w[name] for w in after[3:]], before[3:])


@given(cases())
def test_experts_may_have_any_name(case: Case) -> None:
    check_names(case)


@pytest.mark.parametrize(
    "mutant",
    [
        composed(combine=moe_mutants.combine_with_unsorted_scores),
        rerouted(moe_mutants.forget_the_last_expert),
    ],
    ids=["unsorted scores", "last expert"],
)
def test_a_mixture_that_depends_on_names_is_rejected(mutant: Moe) -> None:
    assert counterexample(lambda case: check_names(case, mutant))
