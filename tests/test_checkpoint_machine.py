"""Training, saving, restoring, moving and crashing in any order is training on one rank."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from disks import Crash, Faulty, MemoryDisk
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from states import same

from functional_ep import Checkpoints, State, adamw, init_state, reshard_state, restore
from functional_ep.checkpoint import committed
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
    """``self.ranks`` are the states of all ranks of ``self.plan``, ``self.model`` of one alone."""

    @initialize(plan=anywhere())
    def begin(self, plan: Plan) -> None:
        self.disk, self.plan = MemoryDisk(), plan
        self.ranks = simulate(lambda comm: begun(comm, plan), plan.mesh)
        (self.model,) = simulate(lambda comm: begun(comm, ALONE), ALONE.mesh)
        self.saved: dict[int, State] = {}

    def on_ranks(self, program: Any, plan: Plan | None = None) -> list[Any]:
        mesh = (plan or self.plan).mesh
        ranks = self.ranks if len(self.ranks) == mesh.size else [None] * mesh.size
        return simulate(program, mesh, ranks)

    @rule(steps=st.integers(1, 3))
    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.ranks = [trained(s, self.plan, rank) for rank, s in enumerate(self.ranks)]
            self.model = trained(self.model, ALONE, 0)

    def write(self, disk: Any, keep: int) -> None:
        def program(comm: Comm, state: State) -> None:
            Checkpoints(ROOT, self.plan, comm, keep=keep, background=False, disk=disk).save(state)

        self.on_ranks(program)

    def keep(self, keep: int) -> None:
        self.saved[int(self.model.step)] = self.model
        for step in sorted(self.saved)[:-keep]:
            del self.saved[step]

    @rule(keep=st.integers(1, 3))
    def save(self, keep: int) -> None:
        self.write(self.disk, keep)
        self.keep(keep)

    @rule(data=st.data(), keep=st.integers(1, 3), seed=seeds(), after=st.booleans())
    def crash(self, data: st.DataObject, keep: int, seed: int, after: bool) -> None:
        """The machine stops while saving; what it has on disk goes on, on any ranks."""
        faulty = Faulty(self.disk, data.draw(st.integers(0, 90)), after=after)
        before = set(self.saved)
        with suppress(Crash):
            self.write(faulty, keep)
        self.keep(keep)
        self.disk = self.disk.after_crash(random.Random(seed))
        steps = {int(path.name[5:]) for path in committed(ROOT, self.disk)}
        assert not before or steps, "all that was saved is lost"
        assert not before or max(steps) >= max(before), "the newest that was saved is lost"
        if not faulty.crashed:
            assert set(self.saved) == steps

        self.saved = self.on_disk()
        if self.saved:
            self.go_on(data.draw(anywhere()))
        else:
            self.begin(data.draw(anywhere()))  # pyright: ignore[reportCallIssue]

    def on_disk(self) -> dict[int, State]:
        found: dict[int, State] = {}
        for path in committed(ROOT, self.disk):
            (state,) = simulate(
                lambda comm, path=path: restore(path, ALONE, comm, disk=self.disk), ALONE.mesh
            )
            expected = self.saved.get(int(state.step))
            assert int(path.name[5:]) == int(state.step)
            assert expected is None or same(state, expected), "what was saved is another"
            found[int(state.step)] = state
        return found

    @precondition(lambda self: self.saved)
    @rule(plan=anywhere())
    def go_on(self, plan: Plan) -> None:
        """From the newest checkpoint, on whatever ranks."""

        def program(comm: Comm) -> State | None:
            return Checkpoints(ROOT, plan, comm, disk=self.disk).restore()

        self.plan, self.ranks = plan, simulate(program, plan.mesh)
        self.model = self.saved[max(self.saved)]

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """Live, to other rules on as many ranks."""
        new = data.draw(anywhere(self.plan.mesh.size))

        def program(comm: Comm, state: State) -> State:
            return reshard_state(state, self.plan, new, comm.on(new.mesh))

        self.ranks, self.plan = self.on_ranks(program), new

    @invariant()
    def every_rank_has_its_part_of_the_model(self) -> None:
        if not hasattr(self, "ranks"):
            return
        model = zip(ALONE.leaves, flatten(self.model.params)[0], strict=True)
        whole = {leaf.path: x for leaf, x in model}
        for rank, state in enumerate(self.ranks):
            assert torch.equal(state.step, self.model.step)
            shards = zip(self.plan.leaves, flatten(state.params)[0], strict=True)
            for leaf, shard in shards:
                held = {"params": (shard, whole[leaf.path])} | {
                    name: (its[leaf.path], self.model.opt["all"][name][leaf.path])
                    for name, its in state.opt[leaf.label].items()
                }
                for name, (found, global_) in held.items():
                    x = partition(
                        self.plan.rules[leaf.label], self.plan.mesh, rank, global_.view(leaf.shape)
                    )
                    assert torch.equal(found, x), f"{name} of {leaf} on rank {rank}"


TestRun = Run.TestCase
TestRun.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)
