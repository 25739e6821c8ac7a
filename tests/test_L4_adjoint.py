"""L4: reduce is the transpose of gather, with another cotangent on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from torch import Tensor

import sharding.gather
from sharding import Comm
from sharding.gather import Layout, reduce
from sharding.mesh import Axes
from sharding.testing import Case, Functions, cases, check_adjoint, counterexample

sum_over = sharding.gather._sum_over


@given(cases())
def test_reduce_is_the_transpose_of_gather(case: Case) -> None:
    check_adjoint(case)


def averages(store: Axes, copies: Axes, flat: list[Tensor], comm: Comm, of: str) -> Any:
    return sum_over(store, copies, [x / comm.mesh.count(copies) for x in flat], comm, of)


def forgets_the_copies(store: Axes, copies: Axes, flat: list[Tensor], comm: Comm, of: str) -> Any:
    return sum_over(store, (), flat, comm, of)


def counts_compute_axes_as_copies(
    store: Axes, copies: Axes, flat: list[Tensor], comm: Comm, of: str
) -> Any:
    return sum_over(store, comm.mesh.rest(store), flat, comm, of)


@pytest.mark.parametrize("mutant", [averages, forgets_the_copies, counts_compute_axes_as_copies])
def test_a_wrong_sum_is_rejected_though_reduce_and_vjp_agree(
    mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding.gather, "_sum_over", mutant)
    assert counterexample(check_adjoint, Functions())


def scales_by_ranks(layouts: Sequence[Layout], grads: Sequence[Tensor], comm: Comm) -> Any:
    return [g * comm.mesh.size for g in reduce(layouts, grads, comm)]


def reduces_into_another_place(
    layouts: Sequence[Layout], grads: Sequence[Tensor], comm: Comm
) -> Any:
    turned = [replace(w.rule, store=w.rule.store[::-1]) for w in layouts]
    layouts = [replace(w, rule=rule) for w, rule in zip(layouts, turned, strict=True)]
    return reduce(layouts, grads, comm)


@pytest.mark.parametrize("mutant", [scales_by_ranks, reduces_into_another_place])
def test_a_reduce_that_is_not_the_vjp_is_rejected(mutant: Callable[..., Any]) -> None:
    assert counterexample(check_adjoint, Functions(reduce=mutant))
