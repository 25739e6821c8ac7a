"""Hypothesis strategies for whole trainings, and the function that runs one on its mesh.

A :class:`Training` is plain data: a mesh, rules, a tiny model, a batch cut unevenly over the ranks,
optimizers, schedule and clipping. ``train(case)`` runs it on simulated ranks; ``case.on(mesh)`` is
the same training on another mesh. The laws of training compare the two, or one with a reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from sharding import Comm, Mesh, Plan, Rule, expert_parallel, make_plan, replicated, simulate, zero3
from sharding.testing import meshes, seeds

from . import lm, schedules
from .optim import Optimizer, adamw, sgd
from .schedules import Schedule
from .state import State, init_state
from .train_step import make_train_step
from .vote import Vote

Batch = dict[str, Tensor]
Sizes = tuple[tuple[int, int], ...]  # sequences and positions of each rank
EPS = 1e-6  # of AdamW, which divides by it what rounding leaves of a gradient that is zero


@dataclass(frozen=True)
class Chosen:
    """An optimizer and its schedule, as data."""

    name: Literal["sgd", "momentum", "nesterov", "adamw"] = "adamw"
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    lr: float = 0.05
    warmup: int = 0
    weight_decay: float = 0.0

    def rate(self) -> Schedule:
        """The learning rate as a function of the step, over a run of about eight steps."""
        if self.schedule == "constant":
            return schedules.constant(self.lr, warmup=self.warmup)
        if self.schedule == "wsd":
            return schedules.wsd(self.lr, warmup=self.warmup, decay=3, total=8)
        make = {"cosine": schedules.cosine, "linear": schedules.linear}[self.schedule]
        return make(self.lr, warmup=self.warmup, total=8)

    def make(self) -> Optimizer:
        """The optimizer."""
        if self.name == "adamw":
            return adamw(self.rate(), eps=EPS, weight_decay=self.weight_decay)
        momentum = 0.0 if self.name == "sgd" else 0.9
        return sgd(self.rate(), momentum, self.name == "nesterov", self.weight_decay)


@dataclass(frozen=True)
class Training:
    """Everything that decides the numbers of a few train steps.

    ``sizes[step][micro][rank]`` is how many sequences of how many positions a rank has. A label
    without an optimizer is frozen.
    """

    mesh: Mesh
    rules: Mapping[str, Rule]
    cfg: lm.Config
    sizes: tuple[tuple[Sizes, ...], ...]
    optimizers: Mapping[str, Chosen]
    clip: float | None = None
    masked: bool = False
    padded: bool = False
    backward: Literal["keep", "regather", "recompute"] = "regather"
    donate: bool = False
    seed: int = 0
    commit: Vote | None = None

    @property
    def frozen(self) -> tuple[str, ...]:
        """The labels that are not trained."""
        return tuple(label for label in self.rules if label not in self.optimizers)

    def params(self) -> lm.Params:
        """The global params before the first step."""
        return lm.init(self.cfg, self.seed, torch.float64)

    def batches(self, rank: int) -> list[list[Batch]]:
        """A rank's microbatches of each step."""
        return [
            [self.batch(step, micro, rank) for micro in range(len(micros))]
            for step, micros in enumerate(self.sizes)
        ]

    def batch(self, step: int, micro: int, rank: int) -> Batch:
        """Random tokens; some labels are -100 if masked, some tails are padding if padded."""
        shape = self.sizes[step][micro][rank]
        stream = torch.Generator().manual_seed(self.seed + 10_007 * step + 101 * micro + rank)
        ids = torch.randint(0, self.cfg.vocab, shape, generator=stream)
        targets = torch.randint(0, self.cfg.vocab, shape, generator=stream)
        batch = {"input_ids": ids}
        if self.masked:
            targets[torch.rand(shape, generator=stream) < 0.4] = lm.IGNORE
        if self.padded:
            lengths = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=stream)
            batch["attention_mask"] = torch.arange(shape[1]) < lengths
            targets = torch.where(batch["attention_mask"], targets, lm.IGNORE)
        return batch | {"labels": targets}

    def on(self, mesh: Mesh) -> Training:
        """The same global batches on another mesh: ranks beyond the old ones have no tokens.

        Raises:
            ValueError: a mesh of fewer ranks, whose batches would not be the same.
        """
        new = mesh.size - self.mesh.size
        if new < 0:
            raise ValueError(f"{mesh} has fewer ranks than {self.mesh}, on which the batch is cut")
        sizes = tuple(tuple(micro + ((0, 1),) * new for micro in step) for step in self.sizes)
        return replace(self, mesh=mesh, sizes=sizes)


class Trained(NamedTuple):
    """What a training came to on one rank: global params, metrics and state of each step."""

    params: list[Any]
    metrics: list[dict[str, Tensor]]
    state: State


def program(comm: Comm, case: Training) -> Trained:
    """Run a training as this rank of the mesh; real ranks or simulated ones."""
    plan, state, step = prepare(comm, case)
    params: list[Any] = []
    metrics: list[dict[str, Tensor]] = []
    for micros in case.batches(comm.rank):
        state, seen = step(state, *micros)
        params.append(plan.full(state.params, comm))
        metrics.append(seen)
    return Trained(params, metrics, state)


def prepare(comm: Comm, case: Training) -> tuple[Plan, State, Any]:
    """Plan, first state and step of a training."""
    params = case.params()
    plan = make_plan(params, lm.labels, case.rules, comm.mesh, frozen=case.frozen)
    optimizers = {label: chosen.make() for label, chosen in case.optimizers.items()}
    loss = lm.loss(case.cfg, plan, comm, case.backward)
    options: dict[str, Any] = dict(clip=case.clip, donate=case.donate, commit=case.commit)
    step = make_train_step(loss, plan, optimizers, comm, **options)
    return plan, init_state(plan.shard(params, comm), plan, optimizers), step


def train(case: Training) -> list[Trained]:
    """Run a training on simulated ranks: what each of them saw.

    >>> from hypothesis import find
    >>> case = find(trainings(), lambda case: case.mesh.size == 2)
    >>> first, second = train(case)
    >>> bool(first.metrics[0]["loss"] == second.metrics[0]["loss"])
    True
    """
    return simulate(program, case.mesh, [case] * case.mesh.size)


@st.composite
def trainings(draw: st.DrawFn, max_ranks: int = 8, max_steps: int = 3) -> Training:
    """Random trainings: every structure that a law of training speaks about.

    >>> from hypothesis import find
    >>> find(trainings(), lambda case: case.mesh["ep"] > 1 and case.mesh["edp"] > 1).mesh
    Mesh(edp=2, ep=2)
    """
    mesh = draw(meshes(max_ranks, ("edp", "ep")))
    steps = draw(st.integers(1, max_steps))
    micros = draw(st.integers(1, 2))
    return Training(
        mesh=mesh,
        rules={"dense": draw(dense_rules()), "expert": draw(expert_rules())},
        cfg=draw(models(mesh["ep"])),
        sizes=tuple(tuple(draw(sizes(mesh)) for _ in range(micros)) for _ in range(steps)),
        optimizers={label: draw(chosen()) for label in draw(trained_labels())},
        clip=draw(st.sampled_from([None, 0.05, 100.0])),
        masked=draw(st.booleans()),
        padded=draw(st.booleans()),
        backward=draw(st.sampled_from(["regather", "keep", "recompute"])),
        donate=draw(st.booleans()),
        seed=draw(seeds()),
    )


def trained_labels() -> st.SearchStrategy[tuple[str, ...]]:
    """Mostly all labels; the others are frozen."""
    return st.sampled_from([("dense", "expert"), ("dense", "expert"), ("dense",), ("expert",)])


def dense_rules() -> st.SearchStrategy[Rule]:
    """ZeRO-3 over both axes in either order, over one, or none."""
    return st.sampled_from([zero3("edp", "ep"), zero3("ep", "edp"), zero3("edp"), replicated()])


def expert_rules() -> st.SearchStrategy[Rule]:
    """Expert parallel with and without ZeRO, and experts that are not split while computing."""
    return st.sampled_from(
        [expert_parallel("ep", store=("edp",)), expert_parallel("ep"), zero3("edp", "ep")]
    )


@st.composite
def models(draw: st.DrawFn, ep: int) -> lm.Config:
    """Tiny models whose experts divide by the ranks; K up to E."""
    experts = ep * draw(st.integers(1, 2))
    return lm.Config(
        vocab=7,
        dim=4,
        layers=draw(st.integers(1, 2)),
        heads=draw(st.sampled_from([1, 2])),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        ffn=draw(st.sampled_from([1, 3])),
        normalise=draw(st.booleans()),
        tied=draw(st.booleans()),
        balance=draw(st.sampled_from([0.0, 0.5])),
        z=draw(st.sampled_from([0.0, 0.1])),
    )


@st.composite
def sizes(draw: st.DrawFn, mesh: Mesh) -> Sizes:
    """Sequences and positions of each rank, down to none, but not none on all."""
    each = [(draw(st.integers(0, 2)), draw(st.integers(1, 3))) for _ in mesh]
    busy = draw(st.integers(0, mesh.size - 1))
    each[busy] = (max(1, each[busy][0]), each[busy][1])
    return tuple(each)


@st.composite
def chosen(draw: st.DrawFn) -> Chosen:
    """An optimizer, a schedule that moves or not, a warm-up, weight decay."""
    return Chosen(
        name=draw(st.sampled_from(["adamw", "sgd", "momentum", "nesterov"])),
        schedule=draw(st.sampled_from(["constant", "cosine", "linear", "wsd"])),
        warmup=draw(st.sampled_from([0, 3])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
    )
