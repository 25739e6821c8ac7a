"""M6: ranks are interchangeable: permuting their batches, or renaming ranks, permutes outcomes."""

from __future__ import annotations

import moe_mutants
import pytest
import torch
from budget import one_in
from hypothesis import given
from hypothesis import strategies as st
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
from moe_mutants import rerouted
from torch import Tensor

import functional_ep.moe
from sharding import Comm, Mesh


def check_ranks(case: Case, moe: Moe = functional_ep.moe.moe) -> None:
    """M6: rank r gets the batch of rank ``order[r]``."""
    batch, weights = make_batch(case), make_weights(case)
    before = on_mesh(case, batch, weights, moe)
    stream = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(case.mesh.size, generator=stream).tolist()
    swapped = case._replace(tokens=tuple(case.tokens[r] for r in order))
    parts = batch.split(case.tokens)
    after = on_mesh(swapped, join([parts[r] for r in order]), weights, moe)
    assert_each_close(after, by_rank(before, case, order))


def join(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(xs) for xs in zip(*parts, strict=True)))


def by_rank(outcome: Outcome, case: Case, order: list[int]) -> Outcome:
    """What belongs to tokens, in another order of the ranks; experts untouched."""

    def permuted(x: Tensor) -> Tensor:
        parts = x.split(case.tokens)
        return torch.cat([parts[r] for r in order])

    y_TD, x_TD, scores_TK, gate_up, down = outcome
    return Outcome(permuted(y_TD), permuted(x_TD), permuted(scores_TK), gate_up, down)


@one_in(2)
@given(cases())
def test_ranks_may_swap_their_batches(case: Case) -> None:
    check_ranks(case)


@one_in(2)
@given(cases(), st.data())
def test_the_order_of_a_meshs_axes_only_names_the_ranks(case: Case, data: st.DataObject) -> None:
    names = data.draw(st.permutations(case.mesh.axes))
    mesh = Mesh(**{axis: case.mesh[axis] for axis in names})
    order = [case.mesh.rank(mesh.coords(r)) for r in mesh]
    batch, weights = make_batch(case), make_weights(case)
    renamed = case._replace(mesh=mesh, tokens=tuple(case.tokens[r] for r in order))
    parts = batch.split(case.tokens)
    found = on_mesh(renamed, join([parts[r] for r in order]), weights)
    assert_each_close(found, by_rank(on_mesh(case, batch, weights), case, order))


def favour_rank_0(ids_TK: Tensor, experts: int, axes: tuple[str, ...], comm: Comm) -> Tensor:
    """The first rank drops what its tokens chose in favour of the first expert."""
    return ids_TK if comm.rank else torch.zeros_like(ids_TK)


@pytest.mark.parametrize(
    "mutant",
    [
        rerouted(moe_mutants.count_from_ones_own_experts),
        rerouted(favour_rank_0),
    ],
    ids=["own experts first", "first rank"],
)
def test_a_mixture_that_depends_on_the_rank_is_rejected(mutant: Moe) -> None:
    assert counterexample(lambda case: check_ranks(case, mutant))
