"""M1: counts over ranks and local experts add up to tokens x K; counts per expert are global."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from moe_cases import Case, cases, counterexample, make_batch
from moe_mutants import count_ones_own_choices
from torch import Tensor

from functional_ep.moe import Dispatched, dispatch
from functional_ep.routing import count_experts
from sharding import Comm, simulate
from sharding.collectives import psum


def check_conservation(case: Case, dispatch: Callable[..., Dispatched] = dispatch) -> None:
    """M1, and what a rank sends is what it has, what it receives what its experts get."""
    batch = make_batch(case)

    def program(comm: Comm, x_TD: Tensor, ids_TK: Tensor) -> Dispatched:
        return dispatch(x_TD, ids_TK, case.experts, case.axes, comm)

    xs, ids, *_ = zip(*batch.split(case.tokens), strict=True)
    ways = simulate(program, case.mesh, xs, ids)
    assert sum(sum(way.counts_e) for way in ways) == sum(case.tokens) * case.choices
    received = torch.zeros(case.experts, dtype=torch.int64)
    for rank, way in enumerate(ways):
        assert len(way.counts_e) == case.local
        assert len(way.rows_RD) == sum(way.counts_e)
        received[case.held(rank)] += torch.tensor(way.counts_e)
        if way.sent:
            assert sum(way.sent) == case.tokens[rank] * case.choices
            assert sum(way.received) == sum(way.counts_e)
    assert received.tolist() == choices_of_each(case, batch.ids_TK)


def choices_of_each(case: Case, ids_TK: Tensor) -> list[int]:
    return [int((ids_TK == e).sum()) for e in range(case.experts)]


def check_counts_are_global(case: Case, count: Callable[..., Tensor] = count_experts) -> None:
    """Added up over all ranks, every rank's counts are those of the whole batch, by global id."""
    batch = make_batch(case)

    def program(comm: Comm, ids_TK: Tensor) -> Tensor:
        return psum(count(ids_TK, case.experts), case.mesh.axes, comm)

    ids = [part.ids_TK for part in batch.split(case.tokens)]
    for counts_E in simulate(program, case.mesh, ids):
        assert counts_E.dtype == torch.int64
        assert counts_E.tolist() == choices_of_each(case, batch.ids_TK)


@given(cases())
def test_every_choice_arrives_once(case: Case) -> None:
    check_conservation(case)


@given(cases())
def test_counts_are_those_of_the_whole_batch(case: Case) -> None:
    check_counts_are_global(case)


def keep_all_at_home(
    x_TD: Tensor, ids_TK: Tensor, experts: int, axes: Any, comm: Comm
) -> Dispatched:
    """Every rank takes its own tokens to the experts it has, by their ids modulo their number."""
    local = experts // comm.mesh.count(axes)
    return dispatch(x_TD, ids_TK % local, local, (), comm)


@pytest.mark.parametrize("mutant", [count_ones_own_choices, keep_all_at_home])
def test_a_dispatch_that_loses_choices_is_rejected(mutant: Callable[..., Dispatched]) -> None:
    assert counterexample(lambda case: check_conservation(case, mutant))


def count_tokens_once(ids_TK: Tensor, experts: int) -> Tensor:
    return count_experts(ids_TK[:, :1], experts)


def count_like_histc(ids_TK: Tensor, experts: int) -> Tensor:
    """Ids out of range, here of the upper half, are dropped without a word."""
    known = ids_TK[ids_TK < max(1, experts // 2)]
    return count_experts(known, experts)


@pytest.mark.parametrize("mutant", [count_tokens_once, count_like_histc])
def test_wrong_counts_are_rejected(mutant: Callable[..., Tensor]) -> None:
    assert counterexample(lambda case: check_counts_are_global(case, mutant))
