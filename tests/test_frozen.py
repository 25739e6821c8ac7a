"""Frozen labels: stored and gathered like others, but not trained, reduced or kept moments for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import MODES
from farm import Farm
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from functional_ep import adamw, init_state, make_train_step
from functional_ep.testing import Training, prepare, trainings
from sharding import (
    Comm,
    Mesh,
    Plan,
    Precision,
    Rule,
    make_plan,
    replicated,
    sharded,
    simulate,
    zero3,
)
from sharding.sharded import Backward
from sharding.testing import Recording, meshes, rules, seeds
from sharding.tree import flatten

MESH = Mesh(ep=2)
PARAMS = [{"w": torch.ones(4, 4), "a": torch.full((4, 4), 0.5)} for _ in range(3)]
LABELS = [{"w": "base", "a": "adapter"}] * 3


def a_plan(frozen: tuple[str, ...] = ("base",), base: Rule | None = None) -> Plan:
    rules = {"base": base or zero3("ep"), "adapter": zero3("ep")}
    return make_plan(PARAMS, LABELS, rules, MESH, frozen=frozen)


def layer(view: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ view["w"] + x @ view["a"])


# -- what is trained -------------------------------------------------------------------------------


def test_strategies_freeze_each_label() -> None:
    for label in ("dense", "expert"):
        case = find(trainings(), lambda case, label=label: case.frozen == (label,))
        assert set(case.optimizers) == {"dense", "expert"} - {label}


@given(trainings(max_steps=2))
@settings(max_examples=20)
def test_frozen_leaves_keep_their_bits_and_have_no_optimizer_state(case: Training) -> None:
    def program(comm: Comm) -> None:
        plan, state, step = prepare(comm, case)
        before = [x.clone() for x in flatten(state.params)[0]]
        for micros in case.batches(comm.rank):
            state, metrics = step(state, *micros)
            assert {f"lr/{label}" for label in case.optimizers} <= set(metrics)
        assert set(state.opt) == set(case.optimizers)
        leaves = zip(plan.leaves, before, flatten(state.params)[0], strict=True)
        for leaf, old, new in leaves:
            assert leaf.label not in case.frozen or torch.equal(old, new)

    simulate(program, case.mesh)


# -- what travels ----------------------------------------------------------------------------------


def travels(comm: Comm, plan: Plan, mode: Backward) -> list[str]:
    recording = Recording(comm)
    shards = plan.shard(PARAMS, comm)
    run = sharded([layer] * 3, plan, recording, mode)
    leaves = [x.requires_grad_() for x in flatten(shards)[0]]
    x = torch.ones(1, 4, requires_grad=True)
    run(shards, x).sum().backward()
    for leaf, entry in zip(plan.leaves, leaves, strict=True):
        assert (entry.grad is None) == (leaf.label in plan.frozen), f"the gradient of {leaf}"
    return [event.op.kind for event in recording.events if event.what == "start"]


@pytest.mark.parametrize("base", [zero3("ep"), replicated()])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_frozen_leaves_are_neither_there_nor_reduced(
    base: Rule, mode: Backward
) -> None:
    for kinds in simulate(travels, MESH, [a_plan(base=base)] * 2, [mode] * 2):
        assert kinds.count("reduce_scatter") == 3 and not kinds.count("all_reduce")
    trained = simulate(travels, MESH, [a_plan((), base)] * 2, [mode] * 2)[0]
    summed = "all_reduce" if base == replicated() else "reduce_scatter"
    assert trained.count(summed) >= 3, "the count sees what is reduced"


@pytest.mark.parametrize("transform", [False, True])
def test_the_same_bits_in_every_mode_as_where_all_is_trained(transform: bool) -> None:
    def gradients(comm: Comm, frozen: tuple[str, ...], mode: Backward) -> list[Tensor]:
        plan = a_plan(frozen)
        shards, x = plan.shard(PARAMS, comm), torch.linspace(-1, 1, 8).view(2, 4)
        run = sharded([layer] * 3, plan, comm, mode)
        adapters = [shard["a"] for shard in shards]

        def loss(adapters: list[Tensor]) -> Tensor:
            mine = zip(shards, adapters, strict=True)
            return run([{**shard, "a": a} for shard, a in mine], x).square().sum()

        if transform:
            return torch.func.grad(loss)(adapters)
        leaves = [a.requires_grad_() for a in adapters]
        return list(torch.autograd.grad(loss(leaves), leaves))

    expected = simulate(gradients, MESH, [()] * 2, ["keep"] * 2)
    for mode in MODES:
        found = simulate(gradients, MESH, [("base",)] * 2, [mode] * 2)
        for ours, theirs in zip(found, expected, strict=True):
            assert all(map(torch.equal, ours, theirs)), mode


@given(mesh=meshes(4), data=st.data(), seed=seeds())
@settings(max_examples=20)
def test_any_rule_may_be_frozen(mesh: Mesh, data: st.DataObject, seed: int) -> None:
    """Gathered in the compute dtype; no derivative, in forward mode neither."""
    stream = torch.Generator().manual_seed(seed)
    params = {"w": torch.randn(mesh.size, 3, generator=stream)}
    rule = data.draw(rules(mesh))
    precision = data.draw(st.sampled_from([None, Precision(torch.bfloat16)]))
    plan = make_plan(params, {"w": "base"}, {"base": rule}, mesh, precision, frozen=["base"])

    def program(comm: Comm) -> None:
        shards = plan.shard(params, comm)
        run = sharded(lambda view: view["w"].float().sum(), plan, comm)
        trained = make_plan(params, {"w": "base"}, {"base": rule}, mesh, precision)
        same = sharded(lambda view: view["w"].float().sum(), trained, comm)
        y, dy = torch.func.jvp(run, (shards,), (shards,))[:2]
        assert torch.equal(y, same(shards)) and not dy.any()
        assert not torch.func.grad(run)(shards)["w"].any()

    simulate(program, mesh)


# -- memory ----------------------------------------------------------------------------------------


def bytes_alive(comm: Comm, blocks: int) -> int:
    """The most bytes of gathered frozen views there are in the backward pass, in views."""
    from test_T9_memory import Watching

    params = [{"w": torch.zeros(8, 8), "a": torch.zeros(8)} for _ in range(blocks)]
    labels = [{"w": "base", "a": "adapter"}] * blocks
    rules = {"base": zero3("ep"), "adapter": replicated()}
    plan = make_plan(params, labels, rules, MESH, frozen=["base"])
    watching, x = Watching(comm), torch.ones(1, 8)
    run = sharded([lambda v, x: torch.tanh(x @ v["w"] + v["a"])] * blocks, plan, watching)
    shards = plan.shard(params, comm)
    loss = run([{**s, "a": s["a"].requires_grad_()} for s in shards], x).sum()
    watching.most = 0
    loss.backward()
    return watching.most


def test_frozen_views_go_when_the_backward_pass_is_done_with_them(ranks2: Farm) -> None:
    for run in (simulate, ranks2.run):
        assert max(run(bytes_alive, MESH, [8] * 2)) <= 3


# -- what is refused -------------------------------------------------------------------------------


def step_with(optimizers: Any, frozen: Any) -> None:
    def program(comm: Comm) -> None:
        plan = a_plan(frozen)
        loss = sharded(lambda view, x: (view[0]["a"].sum(), 1), plan, comm)
        make_train_step(loss, plan, optimizers, comm)
        init_state(plan.shard(PARAMS, comm), plan, optimizers)

    simulate(program, MESH)


@pytest.mark.parametrize(
    ("optimizers", "frozen", "message"),
    [
        (
            {"base": adamw(1.0), "adapter": adamw(1.0)},
            ("base",),
            r"given for \['adapter', 'base'\], but the labels to train are \['adapter'\] "
            r"\(frozen: \['base'\]\)",
        ),
        ({}, ("base",), r"given for \[\], but the labels to train are \['adapter'\]"),
        (adamw(1.0), ("base", "adapter"), r"all labels are frozen, \['adapter', 'base'\]"),
        (adamw(1.0), ("bass",), r"frozen names 'bass': no such label; rules are for \['base'"),
        (adamw(1.0), "base", r"frozen='base': labels are needed, not a string: write \('base',\)"),
    ],
)
def test_what_does_not_fit_is_refused(optimizers: Any, frozen: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_with(optimizers, frozen)


def test_one_optimizer_is_for_all_labels_that_are_trained() -> None:
    step_with(adamw(1.0), ("base",))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_computed_for_the_gradient_of_a_frozen_leaf(mode: Backward) -> None:
    """Nor for that of a constant: in no mode is it asked for."""
    asked: list[tuple[bool, ...]] = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *xs: Tensor) -> Tensor:
            return torch.stack([x.sum() for x in xs]).sum()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            asked.append(ctx.needs_input_grad)
            return tuple(grads[0].expand(4, 4) if needed else None for needed in asked[-1])

    def block(view: dict[str, Tensor], x: Tensor, constant: Tensor) -> Tensor:
        return x + Asks.apply(view["w"], view["a"], constant)

    def program(comm: Comm) -> None:
        shards = plan.shard(PARAMS[:1], comm)
        shards[0]["a"].requires_grad_()
        run = sharded([block], plan, comm, mode)
        run(shards, torch.ones(4, 4, requires_grad=True), torch.ones(4, 4)).sum().backward()

    plan = make_plan(
        PARAMS[:1],
        LABELS[:1],
        {"base": zero3("ep"), "adapter": zero3("ep")},
        MESH,
        frozen=("base",),
    )
    simulate(program, MESH)
    assert asked == [(False, True, False)] * MESH.size
