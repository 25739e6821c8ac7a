"""M2: ``combine(dispatch(x)) = (sum of scores) x``, to the bit, and so are its gradients."""

from __future__ import annotations

from collections.abc import Callable

import moe_mutants
import pytest
import torch
from hypothesis import given
from moe_cases import Case, assert_same, cases, counterexample, make_batch
from torch import Tensor

from functional_ep.moe import Dispatched, combine, dispatch
from sharding import Comm, simulate
from sharding.testing import exact


def check_identity(
    case: Case,
    dispatch: Callable[..., Dispatched] = dispatch,
    combine: Callable[..., Tensor] = combine,
) -> None:
    """M2, with the gradients for tokens and scores."""
    batch = make_batch(case, exact)

    def program(comm: Comm, x_TD: Tensor, ids_TK: Tensor, s_TK: Tensor, g_TD: Tensor) -> None:
        def there_and_back(x_TD: Tensor, s_TK: Tensor) -> Tensor:
            way = dispatch(x_TD, ids_TK, case.experts, case.axes, comm)
            return combine(way.rows_RD, s_TK, way, case.axes, comm)

        y_TD, pull = torch.func.vjp(there_and_back, x_TD, s_TK)[:2]
        dx_TD, ds_TK = pull(g_TD)
        total_T1 = s_TK.sum(-1, keepdim=True)
        per_choice_TK = (x_TD * g_TD).sum(-1, keepdim=True).expand_as(s_TK)
        assert_same([y_TD, dx_TD, ds_TK], [total_T1 * x_TD, total_T1 * g_TD, per_choice_TK])

    simulate(program, case.mesh, *zip(*batch.split(case.tokens), strict=True))


@given(cases())
def test_experts_that_do_nothing_return_the_token(case: Case) -> None:
    check_identity(case)


@pytest.mark.parametrize(
    "mutant",
    [
        moe_mutants.combine_by_the_permutation,
        moe_mutants.return_by_the_permutation,
        moe_mutants.combine_with_unsorted_scores,
        moe_mutants.combine_without_scores,
        moe_mutants.combine_with_constant_scores,
    ],
)
def test_a_wrong_combine_is_rejected(mutant: Callable[..., Tensor]) -> None:
    assert counterexample(lambda case: check_identity(case, combine=mutant))


@pytest.mark.parametrize(
    "mutant", [moe_mutants.dispatch_constants, moe_mutants.leave_rows_as_they_came]
)
def test_a_wrong_dispatch_is_rejected(mutant: Callable[..., Dispatched]) -> None:
    assert counterexample(lambda case: check_identity(case, dispatch=mutant))
