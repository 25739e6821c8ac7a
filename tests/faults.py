"""Faults of a single rank in a single step, to be planted: each has the reason for its veto."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_ep import Reason, State, Vote, adamw, init_state, make_train_step
from sharding import Comm, Mesh, Plan, make_plan, replicated, sharded, zero3
from sharding.collectives import psum
from sharding.comm import Op, Then, Work
from sharding.tree import flatten, unflatten

MESH = Mesh(edp=1, ep=4)  # four copies of what is everywhere
PARAMS = {
    "everywhere": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64),
    "once": torch.ones(5, dtype=torch.float64),
}
RULES = {"everywhere": replicated(), "once": zero3("edp", "ep")}
OPTIMIZER = adamw(0.05)

Batch = dict[str, Tensor]
Total = Callable[[Comm, bool, Tensor], Tensor]


class Fault(NamedTuple):
    """What happens to a rank, and on all ranks to the sum of losses (told whether it is theirs)."""

    name: str
    reason: Reason
    state: Callable[[State], State] = lambda state: state
    batch: Callable[[Batch], Batch] = lambda batch: batch
    shards: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda shards: shards
    arrives: Callable[[Op, list[Tensor]], list[Tensor]] = lambda op, ys: ys
    total: Total = lambda comm, mine, total: total


class Place(NamedTuple):
    """A fault on a rank in a step."""

    fault: Fault
    rank: int
    step: int


def flip(x: Tensor, bit: int = 3) -> Tensor:
    """The same but for one bit of its first number."""
    words = x.detach().clone().view(torch.int64)
    words[0] ^= 1 << bit
    return words.view(x.dtype)


def drift_of(where: Callable[[State], Tensor]) -> Callable[[State], State]:
    def drift(state: State) -> State:
        leaves, spec = flatten(state)
        return unflatten(spec, [flip(x) if x is where(state) else x for x in leaves])

    return drift


class Skewed(torch.autograd.Function):
    """The identity, with a bit of its gradient flipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return flip(grads[0])


def skewed(shards: dict[str, Tensor]) -> dict[str, Tensor]:
    return shards | {"everywhere": Skewed.apply(shards["everywhere"])}


def averaged(op: Op, ys: list[Tensor]) -> list[Tensor]:
    """What the rank would receive if it alone had asked for an average of gradients."""
    gradients = op.kind == "all_reduce" and all(y.shape == (3,) for y in ys)
    return [y / MESH.size for y in ys] if gradients else ys


def not_a_number(comm: Comm, mine: bool, total: Tensor) -> Tensor:
    return total * float("nan") if mine else total


def infinite_slope(shards: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers, with a root of zero on the way back."""
    return {name: x + (x * 0).sqrt() for name, x in shards.items()}


def exchanged(comm: Comm, mine: bool, total: Tensor) -> Tensor:
    """Two sums that look alike, started by a line each, in the other order on one rank."""

    def first() -> Tensor:
        return psum(total.detach(), comm.mesh.axes, comm)

    def second() -> Tensor:
        return psum(total.detach() * 2, comm.mesh.axes, comm)

    found = [f() for f in ((second, first) if mine else (first, second))]
    return total + 0 * sum(found)


def crossed(comm: Comm, mine: bool, total: Tensor) -> Tensor:
    """Along every fiber all is well, but one rank starts those of its fibers the other way round.

    Everybody is alone along the first axis of this arrangement but for pairs along the others.
    """
    there = comm.on(Mesh(a=2, b=2))
    axes = [("a",), ("b",)]
    works = [
        there.start(Op("all_reduce", each), [total.detach()])
        for each in (axes[::-1] if mine else axes)
    ]
    for work in works:
        work.wait()
    return total


FAULTS = [
    Fault("a loss is not a number", Reason.LOSS, total=not_a_number),
    Fault("a gradient is infinite", Reason.GRADIENT, shards=infinite_slope),
    Fault("a parameter drifts", Reason.COPIES, drift_of(lambda s: s.params["everywhere"])),
    Fault(
        "a moment drifts",
        Reason.COPIES,
        drift_of(lambda s: s.opt["everywhere"]["v"]["everywhere"]),
    ),
    Fault("a gradient drifts", Reason.COPIES, shards=skewed),
    Fault("a sum is an average", Reason.COPIES, arrives=averaged),
    Fault("alike collectives are exchanged", Reason.ORDER, total=exchanged),
    Fault("fibers are crossed", Reason.ORDER, total=crossed),
    Fault("another step", Reason.STEP, lambda state: state._replace(step=state.step + 1)),
    Fault("other data", Reason.POSITION, batch=lambda batch: batch | {"at": batch["at"] + 1}),
]


def make_batch(rank: int, step: int) -> Batch:
    random = torch.Generator().manual_seed(10 * step + rank)
    x = torch.rand(rank, 5, dtype=torch.float64, generator=random)  # rank 0 has none
    return {"x": x, "at": torch.tensor(step)}


def squares(view: dict[str, Tensor], x: Tensor) -> Tensor:
    return ((x * view["once"] + view["everywhere"].sum()) ** 2).sum()


class Arena:
    """A training of a small model on one rank, with a fault in one place or with none."""

    def __init__(self, comm: Comm, vote: Vote | None, place: Place | None, donate: bool) -> None:
        self.comm, self.place = comm, place
        self.number = 0
        labels = {name: name for name in PARAMS}
        self.plan: Plan = make_plan(PARAMS, labels, RULES, comm.mesh)
        lifted = sharded(squares, self.plan, comm)

        def loss(shards: dict[str, Tensor], batch: Batch) -> tuple[Tensor, int]:
            if place is None:
                return lifted(shards, batch["x"]), batch["x"].numel()
            shards = place.fault.shards(shards) if self.struck else shards
            total = lifted(shards, batch["x"])
            if self.number == place.step:
                total = place.fault.total(comm, self.struck, total)
            return total, batch["x"].numel()

        self.step = make_train_step(
            loss, self.plan, OPTIMIZER, comm, clip=1.0, donate=donate, commit=vote
        )
        self.state = init_state(self.plan.shard(PARAMS, comm), self.plan, OPTIMIZER)

    @property
    def struck(self) -> bool:
        """Whether the fault is this rank's, now."""
        place = self.place
        return place is not None and (place.rank, place.step) == (self.comm.rank, self.number)

    def take(self, number: int) -> dict[str, Tensor]:
        """One step."""
        self.number = number
        batch = make_batch(self.comm.rank, number)
        if not self.struck:
            self.state, metrics = self.step(self.state, batch)
            return metrics
        assert self.place is not None
        fault = self.place.fault
        self.state = fault.state(self.state)

        def listener(op: Op, xs: Sequence[Tensor], work: Work) -> Work:
            return Then(work, lambda ys: fault.arrives(op, ys))

        with self.comm.heard_by(listener):
            self.state, metrics = self.step(self.state, fault.batch(batch))
        return metrics
