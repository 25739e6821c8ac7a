"""Training, saving, restoring, moving and crashing in any order is training on one rank."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import one_in
from disks import Crash, Faulty, MemoryDisk
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from states import same

from functional_ep import Checkpoints, State, adamw, init_state, reshard_state, restore
from functional_ep.checkpoint import committed
from functional_ep.checkpoint.parts import Part
from sharding import Comm, Mesh, Plan, Rule, make_plan, replicated, simulate
from sharding.rule import partition
from sharding.testing import exact, meshes, rules, seeds
from sharding.tree import flatten, unflatten

SHAPES = {"w": (4, 3), "b": (5,), "s": (), "none": (0, 2)}
PARAMS = {name: exact(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
ROOT = Path("/runs")
OPTIMIZER = adamw(0.1)


def planned(mesh: Mesh, by_label: dict[str, Rule]) -> Plan:
    names = list(by_label)
    labels = {name: names[i % len(names)] for i, name in enumerate(PARAMS)}
    return make_plan(PARAMS, labels, by_label, mesh)


@st.composite
def anywhere(draw: st.DrawFn, ranks: int | None = None) -> Plan:
    """Meshes of up to six ranks, rules and labels; with ``ranks``, one axis of as many."""
    mesh = draw(meshes(6)) if ranks is None else Mesh(**{draw(st.sampled_from("xy")): ranks})
    names = draw(st.sampled_from([("dense",), ("dense", "expert"), ("a", "b", "c")]))
    by_label: dict[str, Rule] = {}
    for name in names:
        drawn = draw(rules(mesh))
        by_label[name] = Rule(store=drawn.axes) if mesh.count(drawn.compute) > 1 else drawn
    return planned(mesh, by_label)


ALONE = planned(Mesh(), {"all": replicated()})


def begun(comm: Comm, plan: Plan) -> State:
    return init_state(plan.shard(PARAMS, comm), plan, OPTIMIZER)


def trained(state: State, plan: Plan, rank: int) -> State:
    """A step of the optimizer: elementwise, so that its bits are the same on every mesh."""
    params, opt = flatten(state.params)[0], dict[str, Any]()
    for label in plan.trained:
        places = [i for i, leaf in enumerate(plan.leaves) if leaf.label == label]
        paths = [plan.leaves[i].path for i in places]
        grads = [
            partition(
                plan.rules[label],
                plan.mesh,
                rank,
                exact(plan.leaves[i].shape, 10 + int(state.step) + len(plan.leaves[i].path)),
            )
            for i in places
        ]
        before = {name: [its[path] for path in paths] for name, its in state.opt[label].items()}
        new, moments = OPTIMIZER.update(
            state.step, [params[i] for i in places], grads, before, False
        )
        for i, x in zip(places, new, strict=True):
            params[i] = x
        opt[label] = {n: dict(zip(paths, xs, strict=True)) for n, xs in moments.items()}
    return State(state.step + 1, unflatten(plan.spec, params), opt)


class Run(RuleBasedStateMachine):
    """``self.ranks`` are the states of all ranks of ``self.plan``; ``self.history``, by step, what
    one rank alone has, which is the same whenever a step is trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.disk, self.saved, self.ranks = MemoryDisk(), set[int](), list[State]()
        self.history = dict(enumerate(simulate(lambda comm: begun(comm, ALONE), ALONE.mesh)))

    @initialize(plan=anywhere())
    def begin(self, plan: Plan) -> None:
        self.plan, self.step = plan, 0
        self.ranks = simulate(lambda comm: begun(comm, plan), plan.mesh)

    @rule(steps=st.integers(1, 3))
    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.ranks = [trained(s, self.plan, rank) for rank, s in enumerate(self.ranks)]
            if self.step + 1 not in self.history:
                self.history[self.step + 1] = trained(self.history[self.step], ALONE, 0)
            self.step += 1

    def write(self, disk: Any, keep: int) -> None:
        def program(comm: Comm, state: State) -> None:
            Checkpoints(ROOT, self.plan, comm, keep=keep, background=False, disk=disk).save(state)

        simulate(program, self.plan.mesh, self.ranks)

    @rule(keep=st.integers(1, 3))
    def save(self, keep: int) -> None:
        self.write(self.disk, keep)
        self.saved = set(sorted(self.saved | {self.step})[-keep:])
        assert self.on_disk() == self.saved

    @rule(at=st.integers(0, 90), keep=st.integers(1, 3), seed=seeds(), after=st.booleans())
    def crash(self, at: int, keep: int, seed: int, after: bool) -> None:
        """The machine stops while saving; what is left of its disk is what goes on."""
        faulty = Faulty(self.disk, at, after=after)
        with suppress(Crash):
            self.write(faulty, keep)
        self.disk = self.disk.after_crash(random.Random(seed) if seed % 3 else None)
        before, self.saved = self.saved, self.on_disk()
        assert self.saved <= before | {self.step}
        assert not before or max(self.saved) >= max(before), "what was saved last is lost"
        assert faulty.crashed or self.step in self.saved, "what was saved now is lost"
        if not self.saved:
            self.begin(self.plan)
        else:
            self.go_on(self.plan)

    def on_disk(self) -> set[int]:
        """The steps there are, each of which is what was saved then."""
        for path in committed(ROOT, self.disk):

            def program(comm: Comm, path: Path = path) -> State:
                return restore(path, ALONE, comm, disk=self.disk)

            (state,) = simulate(program, ALONE.mesh)
            assert same(state, self.history[int(path.name[5:])]), "what was saved is another"
        return {int(path.name[5:]) for path in committed(ROOT, self.disk)}

    @precondition(lambda self: self.saved)
    @rule(plan=anywhere())
    def go_on(self, plan: Plan) -> None:
        """From the newest checkpoint, on whatever ranks."""

        def program(comm: Comm) -> State:
            state = Checkpoints(ROOT, plan, comm, disk=self.disk).restore()
            assert state is not None
            return state

        self.plan, self.step = plan, max(self.saved)
        self.ranks = simulate(program, plan.mesh)

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """Live, to other rules on as many ranks."""
        new = data.draw(anywhere(self.plan.mesh.size))

        def program(comm: Comm, state: State) -> State:
            return reshard_state(state, self.plan, new, comm.on(new.mesh))

        self.ranks, self.plan = simulate(program, self.plan.mesh, self.ranks), new

    @invariant()
    def every_rank_has_its_part_of_the_model(self) -> None:
        if not self.ranks:
            return
        alone = self.history[self.step]
        model = zip(ALONE.leaves, flatten(alone.params)[0], strict=True)
        whole = {leaf.path: x for leaf, x in model}
        for rank, state in enumerate(self.ranks):
            assert torch.equal(state.step, alone.step)
            shards = zip(self.plan.leaves, flatten(state.params)[0], strict=True)
            for leaf, shard in shards:
                held = {"params": (shard, whole[leaf.path])} | {
                    name: (its[leaf.path], alone.opt["all"][name][leaf.path])
                    for name, its in state.opt[leaf.label].items()
                }
                for name, (found, global_) in held.items():
                    x = partition(
                        self.plan.rules[leaf.label], self.plan.mesh, rank, global_.view(leaf.shape)
                    )
                    assert torch.equal(found, x), f"{name} of {leaf} on rank {rank}"


TestRun = Run.TestCase
TestRun.settings = settings(one_in(2), stateful_step_count=12)


def forgotten(path: Path, memories: list[memoryview], disk: Any) -> None:
    """A file that is not synced."""
    file = disk.create(path)
    for memory in memories:
        disk.write(file, memory)
    disk.close(file)


def without_v(parts: list[Part]) -> list[Part]:
    return [part._replace(x=part.x * (part.role != "v")) for part in parts]


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("payload.write_all", forgotten),
        ("checkpoints.on_cpu", without_v),
    ],
    ids=["not synced", "a moment is lost"],
)
def test_what_can_go_wrong_is_found(
    where: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"functional_ep.checkpoint.{where}", wrong)
    settings_ = settings(max_examples=100, stateful_step_count=8, phases=[Phase.generate])
    with pytest.raises((AssertionError, ValueError, OSError)):
        run_state_machine_as_test(Run, settings=settings_)
