"""T10: there and back is the identity; a training that moves is one in a single process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from closeness import assert_close, assert_leaves_close
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from optree import tree_map
from torch import Tensor

from functional_ep import State, adamw, init_state, make_train_step, reshard_state, sgd
from functional_ep.testing import Training, dense_rules, expert_rules, prepare, trainings
from sharding import Comm, Mesh, Plan, make_plan, replicated, reshard, sharded, simulate, zero3
from sharding.reshard import _part, _Places
from sharding.testing import Recording, exact_params, meshes, plans


@st.composite
def two_plans(draw: st.DrawFn) -> tuple[Plan, Plan]:
    """Plans of the same params on two meshes of as many ranks, with rules of their own."""
    old = draw(meshes().flatmap(plans))
    sizes = [size for _, size in old.mesh.sizes]
    axes = draw(st.permutations(["a", "b", "c", "d"]))[: len(sizes)]
    mesh = Mesh(**dict(zip(axes, draw(st.permutations(sizes)), strict=True)))
    stored = draw(st.sampled_from([replicated(), zero3(*mesh.axes), zero3(*mesh.axes[:1])]))
    params = tree_map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype), old.tree)
    new = make_plan(params, tree_map(lambda leaf: "all", old.tree), {"all": stored}, mesh)
    return old, new


def there_and_back(comm: Comm, old: Plan, new: Plan, seed: int) -> tuple[Any, Any, Any]:
    shards = old.shard(exact_params(old, seed), comm)
    other = comm.on(new.mesh)
    moved = reshard(shards, old, new, other)
    return new.full(moved, other), reshard(moved, new, old, comm), shards


def is_the_identity(old: Plan, new: Plan, seed: int) -> None:
    n = old.mesh.size
    params = old.flatten(exact_params(old, seed))
    for whole, back, shards in simulate(there_and_back, old.mesh, [old] * n, [new] * n, [seed] * n):
        for found, expected in zip(old.flatten(whole), params, strict=True):
            assert torch.equal(found, expected), "T10: resharded and put together"
        for found, expected in zip(old.flatten(back), old.flatten(shards), strict=True):
            assert torch.equal(found, expected), "T10: there and back"


@given(two_plans(), st.integers(0, 2**20))
def test_there_and_back_is_the_identity(drawn: tuple[Plan, Plan], seed: int) -> None:
    is_the_identity(*drawn, seed)


def arrives_once(old: Plan, new: Plan) -> None:
    """What the ranks send each of them tiles its new interval."""
    for a, b in zip(old.layouts, new.layouts, strict=True):
        before, after = _Places(a), _Places(b)
        for receiver in new.mesh:
            parts = [_part(before, after, sender, receiver) for sender in old.mesh]
            lo, hi = after.intervals[receiver]
            for start, stop in sorted(part for part in parts if part[0] < part[1]):
                assert start == lo, f"T10: {parts} do not tile {after.intervals[receiver]}"
                lo = stop
            assert lo == hi, f"T10: {parts} do not fill {after.intervals[receiver]}"


@given(two_plans())
def test_every_entry_arrives_once(drawn: tuple[Plan, Plan]) -> None:
    arrives_once(*drawn)


@pytest.mark.parametrize("every", [True, False], ids=["every copy sends", "only the own is used"])
def test_a_copy_too_many_or_too_few_is_rejected(
    every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, mesh = {"w": torch.zeros(8)}, Mesh(edp=2, ep=2)
    old, new = (
        make_plan(params, {"w": "x"}, {"x": rule}, mesh)
        for rule in (zero3("ep"), zero3("edp", "ep"))
    )
    arrives_once(old, new)
    is_the_identity(old, new, 0)
    wrong = (lambda self, s, r: True) if every else (lambda self, s, r: s == r)
    monkeypatch.setattr(_Places, "sends", wrong)
    with pytest.raises(AssertionError, match="do not"):
        arrives_once(old, new)
    if not every:  # the same numbers twice are the same numbers
        with pytest.raises(AssertionError, match="T10: resharded"):
            is_the_identity(old, new, 0)


def test_what_a_rank_has_already_does_not_travel() -> None:
    params, mesh = {"w": torch.arange(8.0)}, Mesh(edp=2, ep=2)
    old = make_plan(params, {"w": "x"}, {"x": replicated()}, mesh)
    new = make_plan(params, {"w": "x"}, {"x": zero3("edp", "ep")}, mesh)

    def program(comm: Comm) -> None:
        recording = Recording(comm)
        reshard(old.shard(params, comm), old, new, recording)
        (event,) = [event for event in recording.events if event.what == "start"]
        expected = tuple(2 if rank == comm.rank else 0 for rank in mesh)
        assert event.op.send == event.op.receive == expected

    simulate(program, mesh)


def on_real_ranks(comm: Comm, old: Plan, new: Plan) -> list[Tensor]:
    whole, back, shards = there_and_back(comm, old, new, 3)
    assert all(map(torch.equal, old.flatten(back), old.flatten(shards)))
    return old.flatten(whole)


def test_real_ranks_reshard_as_simulated_ones(ranks4: Farm) -> None:
    params = {"w": torch.zeros(8, 3), "b": torch.zeros(5), "s": torch.zeros(())}
    labels = {"w": "w", "b": "b", "s": "b"}
    old = make_plan(params, labels, {"w": zero3("ep"), "b": zero3("edp", "ep")}, Mesh(edp=2, ep=2))
    new = make_plan(params, labels, {"w": zero3("a"), "b": replicated()}, Mesh(a=4))
    arguments = [old] * 4, [new] * 4
    expected = old.flatten(exact_params(old, 3))
    for found in ranks4.run(on_real_ranks, old.mesh, *arguments):
        assert all(map(torch.equal, found, expected))


# -- a state in the middle of a training -----------------------------------------------------------


@st.composite
def moves(draw: st.DrawFn) -> tuple[Training, Training]:
    """A training of two steps or three, and the same on another mesh of as many ranks."""
    case = draw(trainings(max_steps=3).filter(lambda case: len(case.sizes) > 1))
    size, experts = case.mesh.size, case.cfg.experts
    fits = [ep for ep in range(1, size + 1) if size % ep == 0 and experts % ep == 0]
    ep = draw(st.sampled_from(fits))
    rules = {"dense": draw(dense_rules()), "expert": draw(expert_rules())}
    return case, replace(case, mesh=Mesh(edp=size // ep, ep=ep), rules=rules)


def moved(comm: Comm, case: Training, other: Training) -> list[tuple[Tensor, Tensor, Any]]:
    """The first step on one mesh, the others on another."""
    plan, state, step = prepare(comm, case)
    there = comm.on(other.mesh)
    new_plan, _, new_step = prepare(there, other)
    history: list[tuple[Tensor, Tensor, Any]] = []
    for number, micros in enumerate(case.batches(comm.rank)):
        if number == 1:
            state = reshard_state(state, plan, new_plan, there)
            comm, plan, step = there, new_plan, new_step
        state, metrics = step(state, *micros)
        history.append((metrics["loss"], metrics["grad_norm"], plan.full(state.params, comm)))
    return history


@given(moves())
def test_training_goes_on_elsewhere_as_if_it_had_begun_there(
    drawn: tuple[Training, Training],
) -> None:
    case, other = drawn
    expected = reference.train(case)
    n = case.mesh.size
    for history in simulate(moved, case.mesh, [case] * n, [other] * n):
        for number, (found, plain) in enumerate(zip(history, expected, strict=True)):
            loss, norm, params = found
            assert_close(loss, plain.loss, f"loss of step {number}")
            assert_close(norm, plain.norm, f"norm of step {number}")
            assert_leaves_close(reference.named(params), plain.params, f"params of step {number}")


# -- what is refused -------------------------------------------------------------------------------


def test_plans_that_do_not_fit_are_refused() -> None:
    params, mesh = {"w": torch.zeros(4)}, Mesh(edp=2)

    def plan(params: Any, mesh: Mesh = mesh) -> Plan:
        return make_plan(params, dict.fromkeys(params, "x"), {"x": zero3("edp")}, mesh)

    old = plan(params)
    for new, message in (
        (plan(params, Mesh(edp=4)), r"differ in how many they are: save a checkpoint"),
        (plan({"w": torch.zeros(6)}), r"differ in params\['w'\] \(4,\).* and params\['w'\] \(6,\)"),
        (plan({**params, "x": torch.zeros(1)}), r"different params: they differ in params\['x'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(lambda comm, new=new: reshard(old.shard(params, comm), old, new, comm), mesh)
    with pytest.raises(ValueError, match=r"Mesh\(ep=4\) has 4 ranks, but there are 2"):
        simulate(lambda comm: comm.on(Mesh(ep=4)), mesh)


def test_states_that_cannot_go_on_are_refused() -> None:
    params, mesh = {"v": torch.zeros(4), "w": torch.zeros(4)}, Mesh(edp=2)
    rules = {"a": zero3("edp"), "b": zero3("edp")}
    apart = make_plan(params, {"v": "a", "w": "b"}, rules, mesh)
    frozen = make_plan(params, {"v": "a", "w": "b"}, rules, mesh, frozen=("b",))
    together = make_plan(params, {"v": "x", "w": "x"}, {"x": zero3("edp")}, mesh)

    def program(comm: Comm, old: Plan, optimizers: Any) -> None:
        state = init_state(old.shard(params, comm), old, optimizers)
        reshard_state(state, old, together, comm)

    different = {"a": adamw(1.0), "b": sgd(1.0)}
    with pytest.raises(ValueError, match=r"'x': 'v' has the moments \['m', 'v'\] and 'w' has \[\]"):
        simulate(program, mesh, [apart] * 2, [different] * 2)
    with pytest.raises(ValueError, match=r"'w' was frozen and has no moments to go on with"):
        simulate(program, mesh, [frozen] * 2, [adamw(1.0)] * 2)


# -- what is no state of the plan --------------------------------------------------------------


WHOLE = make_plan({"w": torch.ones(8)}, {"w": "x"}, {"x": replicated()}, Mesh(edp=2))
SPLIT = make_plan({"w": torch.ones(8)}, {"w": "x"}, {"x": zero3("edp")}, Mesh(edp=2))


def test_shards_of_another_plan_are_refused() -> None:
    """Plans that were mixed up: replicated shards cut as if each had half would repeat a half."""

    def moves(comm: Comm) -> None:
        reshard(WHOLE.shard({"w": torch.arange(8.0)}, comm), SPLIT, WHOLE, comm)

    with pytest.raises(
        ValueError, match=r"shards\['w'\]: a shard \(4,\) of \(8,\) expected, found"
    ):
        simulate(moves, Mesh(edp=2))


def test_so_are_a_donated_state_and_moments_of_another_plan() -> None:
    def begun(plan: Plan, comm: Comm) -> State:
        return init_state(plan.shard({"w": torch.ones(8)}, comm), plan, adamw(0.1))

    def with_other_moments(comm: Comm) -> None:
        state = begun(SPLIT, comm)._replace(opt=begun(WHOLE, comm).opt)
        reshard_state(state, SPLIT, WHOLE, comm)

    def donated(comm: Comm) -> None:
        state = begun(SPLIT, comm)
        loss = sharded(lambda view: (view["w"].sum(), 1), SPLIT, comm)
        step = make_train_step(lambda p, _: loss(p), SPLIT, adamw(0.1), comm, donate=True)
        step(state, {})
        reshard_state(state, SPLIT, WHOLE, comm)

    with pytest.raises(ValueError, match=r"a shard \(4,\) of \(8,\) expected, found \(8,\)"):
        simulate(with_other_moments, Mesh(edp=2))
    with pytest.raises(ValueError, match="donated to a step: move the one that the step returned"):
        simulate(donated, Mesh(edp=2))


def test_nothing_is_moved_under_a_transform() -> None:
    def program(comm: Comm) -> None:
        shards = SPLIT.shard({"w": torch.ones(8)}, comm)
        torch.func.grad(lambda p: reshard(p, SPLIT, WHOLE, comm)["w"].sum())(shards)

    with pytest.raises(ValueError, match="reshard under a transform"):
        simulate(program, Mesh(edp=2))
