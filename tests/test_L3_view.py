"""L3: ``gather(partition(x))`` is the rank's slice of dim 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from torch import Tensor

from sharding import Comm, Rule
from sharding.gather import Layout, gather
from sharding.testing import Case, Functions, cases, check_view, counterexample


@given(cases())
def test_the_view_is_the_ranks_slice(case: Case) -> None:
    check_view(case)


def gathers_in_mesh_order(
    layouts: Sequence[Layout], shards: Sequence[Tensor], comm: Comm
) -> Sequence[Tensor]:
    def sort(rule: Rule) -> Rule:
        return replace(rule, store=tuple(sorted(rule.store, key=comm.mesh.axes.index)))

    return gather([replace(w, rule=sort(w.rule)) for w in layouts], shards, comm)


def forgets_to_gather(
    layouts: Sequence[Layout], shards: Sequence[Tensor], comm: Comm
) -> Sequence[Tensor]:
    views = gather(layouts, shards, comm)
    return [view if w.store == () else view * 0 for view, w in zip(views, layouts, strict=True)]


def flattens(layouts: Sequence[Layout], shards: Sequence[Tensor], comm: Comm) -> Sequence[Tensor]:
    return [view.reshape(-1) for view in gather(layouts, shards, comm)]


@pytest.mark.parametrize("mutant", [gathers_in_mesh_order, forgets_to_gather, flattens])
def test_a_wrong_gather_is_rejected(mutant: Callable[..., Sequence[Tensor]]) -> None:
    assert counterexample(check_view, Functions(gather=mutant))
