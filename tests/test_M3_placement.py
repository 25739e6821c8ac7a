"""M3: a row at local expert j of ep-rank q was routed to expert ``q E/ep + j``."""

from __future__ import annotations

from collections.abc import Callable

import moe_mutants
import pytest
import torch
from hypothesis import given
from moe_cases import Case, cases, counterexample, make_batch
from torch import Tensor

from functional_ep.moe import Dispatched, dispatch
from sharding import Comm, simulate
from sharding.mesh import Axes


def check_placement(case: Case, dispatch: Callable[..., Dispatched] = dispatch) -> None:
    """M3: each expert has received exactly the tokens of its colleagues' ranks that chose it.

    A row is its rank, its token and the token's choices: it says itself where it belongs.
    """
    ids = [part.ids_TK for part in make_batch(case).split(case.tokens)]

    def program(comm: Comm, ids_TK: Tensor) -> Dispatched:
        tokens = torch.arange(len(ids_TK))
        names = torch.stack([torch.full_like(tokens, comm.rank), tokens], 1)
        return dispatch(torch.cat([names, ids_TK], 1), ids_TK, case.experts, case.axes, comm)

    for rank, way in enumerate(simulate(program, case.mesh, ids)):
        arrived = way.rows_RD.split(way.counts_e)
        for e, rows in zip(range(case.experts)[case.held(rank)], arrived, strict=True):
            assert all(e in row[2:] for row in rows.tolist()), f"expert {e} received {rows}"
            expected = [
                [peer, t]
                for peer in case.colleagues(rank)
                for t, chosen in enumerate(ids[peer].tolist())
                if e in chosen
            ]
            assert sorted(rows[:, :2].tolist()) == expected


@given(cases())
def test_every_row_is_at_the_expert_that_it_chose(case: Case) -> None:
    check_placement(case)


def rerouted(change: Callable[[Tensor, int, Axes, Comm], Tensor]) -> Callable[..., Dispatched]:
    def run(x_TD: Tensor, ids_TK: Tensor, experts: int, axes: Axes, comm: Comm) -> Dispatched:
        return dispatch(x_TD, change(ids_TK, experts, axes, comm), experts, axes, comm)

    return run


def number_axes_backwards(
    x_TD: Tensor, ids_TK: Tensor, experts: int, axes: Axes, comm: Comm
) -> Dispatched:
    return dispatch(x_TD, ids_TK, experts, axes[::-1], comm)


@pytest.mark.parametrize(
    "mutant",
    [
        moe_mutants.leave_rows_as_they_came,
        number_axes_backwards,
        rerouted(moe_mutants.deal_experts_out),
        rerouted(moe_mutants.count_from_ones_own_experts),
        rerouted(moe_mutants.forget_the_last_expert),
    ],
    ids=["order of arrival", "axes", "round robin", "own experts first", "last expert"],
)
def test_rows_in_the_wrong_place_are_rejected(mutant: Callable[..., Dispatched]) -> None:
    assert counterexample(lambda case: check_placement(case, mutant))
