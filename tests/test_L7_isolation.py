"""L7: what happens to one label's leaves says nothing to those of another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from budget import one_in
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sharding.gather
from sharding import Comm, Mesh, Plan, expert_parallel, make_plan, sharded, simulate, zero3
from sharding.gather import Gather, Layout, gather
from sharding.mesh import Axes
from sharding.sharded import Backward
from sharding.testing import (
    Case,
    Functions,
    Recording,
    cases,
    check_isolation,
    counterexample,
    exact,
    exact_params,
    meshes,
    plans,
    seeds,
)

LABELS = ("dense", "expert")
MODES: list[Backward] = ["keep", "regather", "recompute"]


@given(cases())
def test_a_leaf_moves_the_same_next_to_nan(case: Case) -> None:
    check_isolation(case)


def without(label: str, comm: Comm, plan: Plan, seed: int, poison: bool, how: Backward) -> Any:
    """Shards, views and gradients of all labels but one, which may be NaN."""
    others = [i for i, leaf in enumerate(plan.leaves) if leaf.label != label]
    params = exact_params(plan, seed)
    if poison:
        params = [x if i in others else torch.full_like(x, math.nan) for i, x in enumerate(params)]
    shards = plan.shard(params, comm)

    def loss(views: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        products = [(view * w).sum() for view, w in zip(views, weights, strict=True)]
        return torch.stack(products).sum(), views

    weights = [exact(w.view_shape, seed + comm.rank) for w in plan.layouts]
    gradient = torch.func.grad(sharded(loss, plan, comm, how), has_aux=True)
    grads, views = gradient(shards, weights)
    return [tree[i] for tree in (shards, views, grads) for i in others]


def check_labels(plan: Plan, seed: int, backward: Backward, ranks: Any = simulate) -> None:
    """L7: poisoning a label leaves shards, views and gradients of the other as they are."""
    for label in LABELS:
        results: list[Any] = []
        for poison in (False, True):
            arguments = [[x] * plan.mesh.size for x in (plan, seed, poison, backward)]
            results.append(ranks(partial(without, label), plan.mesh, *arguments))
        for rank, (clean, poisoned) in enumerate(zip(*results, strict=True)):
            for found, expected in zip(poisoned, clean, strict=True):
                assert torch.equal(found, expected), f"L7: NaN of {label!r} reached rank {rank}"


@one_in(2)
@given(st.data())
def test_a_poisoned_label_does_not_reach_the_other(data: st.DataObject) -> None:
    plan = data.draw(meshes().flatmap(plans))
    check_labels(plan, data.draw(seeds()), data.draw(st.sampled_from(MODES)))


@pytest.mark.parametrize("backward", MODES)
def test_nor_where_small_leaves_share_a_message(ranks2: Farm, backward: Backward) -> None:
    rules = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
    params = [torch.zeros(4, 3, dtype=torch.float64) for _ in range(4)]
    for mesh in (Mesh(edp=2, ep=1), Mesh(edp=1, ep=2)):
        plan = make_plan(params, ["dense", "expert"] * 2, rules, mesh)
        check_labels(plan, 0, backward, ranks2.run)


# -- axes ----------------------------------------------------------------------------------------


def traffic(plan: Plan) -> Counter[tuple[str, Axes, tuple[int, ...]]]:
    """Kind, axes and shape of every tensor that travels in a forward and a backward pass."""

    def program(comm: Comm) -> Recording:
        recording = Recording(comm)
        shards = plan.shard(exact_params(plan, 0), comm)
        loss = sharded(lambda views: torch.stack([v.sum() for v in views]).sum(), plan, recording)
        torch.func.grad(loss)(shards)
        return recording

    started = [e for e in simulate(program, plan.mesh)[0].events if e.what == "start"]
    return Counter((e.op.kind, e.op.axes, shape) for e in started for shape in e.shapes)


def check_axes(plan: Plan) -> None:
    """L7: a label's collectives name its store axes or those of its copies, and no others."""
    together = traffic(plan)
    for label in plan.labels:
        rule = plan.rules[label]
        alone = traffic(plan.at([leaf for leaf in plan.leaves if leaf.label == label]))
        for kind, axes, _ in alone:
            own = rule.copies(plan.mesh) if kind == "all_reduce" else rule.store
            assert axes == own, f"L7: {kind} over {axes} for {rule} on {plan.mesh}"
        together.subtract(alone)
    assert not any(together.values()), f"L7: labels together and apart send other tensors: {plan}"


@one_in(2)
@given(meshes().flatmap(plans))
def test_a_labels_collectives_name_only_its_axes(plan: Plan) -> None:
    check_axes(plan)


# -- planted -------------------------------------------------------------------------------------


def leaks(layouts: Sequence[Layout], shards: Sequence[Tensor], comm: Comm) -> Sequence[Tensor]:
    views = gather(layouts, shards, comm)
    return [view + 0 * torch.stack([v.sum() for v in views]).sum() for view in views]


def test_a_gather_that_mixes_leaves_is_rejected() -> None:
    assert counterexample(check_isolation, Functions(gather=leaks))


def test_a_block_that_mixes_labels_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Gather._finish

    def mixed(linear: Gather, ys: list[Tensor]) -> list[Tensor]:
        views = finish(linear, ys)
        return [view + 0 * torch.stack([v.sum() for v in views]).sum() for view in views]

    monkeypatch.setattr(Gather, "_finish", mixed)
    rules = {"dense": zero3("ep"), "expert": zero3("ep")}
    plan = make_plan([torch.zeros(4, dtype=torch.float64)] * 2, list(LABELS), rules, Mesh(ep=2))
    with pytest.raises(AssertionError, match="L7: NaN of 'dense' reached rank 0"):
        check_labels(plan, 0, "keep")


def test_sums_over_axes_of_other_labels_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sharding.gather._sum_over

    def over_everything(store: Axes, copies: Axes, flat: list[Tensor], comm: Comm, of: str) -> Any:
        return right(store, comm.mesh.rest(store), flat, comm, of)

    rules = {"expert": expert_parallel("ep", store=("edp",))}
    plan = make_plan([torch.zeros(4, 3)], ["expert"], rules, Mesh(edp=2, ep=2))
    check_axes(plan)
    monkeypatch.setattr(sharding.gather, "_sum_over", over_everything)
    with pytest.raises(AssertionError, match="L7: all_reduce over"):
        check_axes(plan)
