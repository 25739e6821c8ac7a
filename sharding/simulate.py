"""Simulated ranks: every rank of a mesh in one process, in lock step.

One thread per rank, exactly one of them running at a time. A rank runs until it awaits a collective
that not all of its fiber has started; then the next rank runs. So a simulation is deterministic, a
rank that skips a collective is an error with a table instead of a hang, and the program is the very
program that runs on real ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.eager_transforms import jvp_increment_nesting

from .comm import Comm, Divergence, Op, Work
from .divergence import kinds, mismatch, table, where
from .mesh import Mesh
from .specification import specification
from .streams import current_stream, go_on, put, stand

R = TypeVar("R")
PerRank = Sequence[Any] | Tensor  # one value for each rank
HEARD_WITHIN = 0.5  # seconds: a signal that comes just before a wait begins is heard after it


class _Abandoned(BaseException):
    """Ends a rank's thread after another rank has failed; never seen by the caller."""


def simulate(
    program: Callable[..., R],
    mesh: Mesh,
    *per_rank: PerRank,
    device: str | torch.device = "cpu",
) -> list[R]:
    """``[program(comm_r, *(arg[r] for arg in per_rank)) for r in mesh]``, all ranks in lock step.

    Each rank has a random stream of its own, as a process has, which starts where the caller's
    stands; the caller's own stream is left as it was. Every transform of ``torch.func`` works
    inside the program. Transforms and backward passes do not reach across the edge of a simulation.

    Args:
        program: called as ``program(comm, *args)`` on every rank.
        mesh: the ranks.
        per_rank: for each argument of the program, a sequence of one value per rank.
        device: ``comm.device``: where what the library makes for a rank is made, such as shards
            that are loaded. Ranks on a GPU share it, and the caller's stream.

    Raises:
        Divergence: a rank awaits a collective that another rank of its fiber never starts, or
            starts differently; the message is a table of where each rank stands.
        Exception: whatever the program raises, with a note that names the rank.

    >>> from sharding import Mesh
    >>> simulate(lambda comm, x: comm.all_reduce([x], ("ep",)), Mesh(ep=2), torch.tensor([1, 2]))
    [[tensor(3)], [tensor(3)]]
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "simulate() inside a torch.func transform: ranks are threads, which a transform does "
            "not reach. Put the transform inside the program: simulate(lambda comm: grad(f)(...))"
        )
    for position, values in enumerate(per_rank):
        if len(values) != mesh.size:
            raise ValueError(
                f"per_rank[{position}] has {len(values)} values for the {mesh.size} ranks of {mesh}"
            )
    world = _World(mesh, torch.device(device))
    # Forward-mode levels are global to the process: the first rank to leave a jvp would clear the
    # tangents of the others. While this outer level is held, no inner one opens or closes it.
    with jvp_increment_nesting(), torch.autograd.forward_ad.dual_level():
        world.run(program, per_rank)
    return world.results()


@dataclass
class _Rank:
    """One simulated rank: its thread, its turn, its random stream, and how it ended."""

    thread: threading.Thread | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    random: list[Tensor] = field(default_factory=stand)
    awaits: _Work | None = None
    ended: bool = False
    result: Any = None
    error: BaseException | None = None


@dataclass
class _Work:
    """A collective that this rank has started: complete once the whole fiber has."""

    comm: _SimulatedComm
    op: Op
    xs: list[Tensor]
    fiber: tuple[int, ...]
    number: int  # of the collectives of this rank over this fiber, from 1 on
    result: list[Tensor] | None = None

    def wait(self) -> list[Tensor]:
        if self.result is None:
            self.comm.world.park(self.comm.rank, self)
        assert self.result is not None
        return self.result

    def __str__(self) -> str:
        return f"{self.op} of {kinds(self.xs)}, no. {self.number} among ranks {self.fiber}"


class _SimulatedComm(Comm):
    def __init__(self, world: _World, rank: int, device: torch.device) -> None:
        super().__init__(world.mesh, rank)
        self.world, self.device = world, device
        self.started: dict[tuple[int, ...], int] = {}

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        if self.world.over:
            raise RuntimeError(
                f"{op} on rank {self.rank} after its simulation has ended: results of simulate() "
                "carry no gradient to the outside; run the backward pass inside the program"
            )
        fiber = self.fiber(op.axes)
        self.started[fiber] = number = self.started.get(fiber, 0) + 1
        work = _Work(self, op, xs, fiber, number)
        self.world.post(work)
        return work


class _World:
    """The ranks, the collectives that some of a fiber have started, and whose turn it is."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.comms = [_SimulatedComm(self, rank, device) for rank in mesh]
        self.ranks = [_Rank() for _ in mesh]
        self.posted: dict[tuple[tuple[int, ...], int], dict[int, _Work]] = {}
        self.failed: int | None = None
        self.over = False
        self.all_ended = threading.Event()

    def run(self, program: Callable[..., Any], per_rank: Sequence[PerRank]) -> None:
        callers_random, grad, stream = stand(), torch.is_grad_enabled(), current_stream()

        def body(r: int) -> None:
            rank = self.ranks[r]
            rank.turn.acquire()
            try:
                # Backward passes stay in this thread: it is the one whose turn it is.
                with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(grad):
                    go_on(stream)
                    self.resume(r)
                    rank.result = program(self.comms[r], *(values[r] for values in per_rank))
            except BaseException as error:
                rank.error = error
                if self.failed is None and not isinstance(error, _Abandoned):
                    self.failed = r
            rank.ended = True
            self.pass_turn(r)

        for r, rank in enumerate(self.ranks):
            rank.thread = threading.Thread(target=body, args=(r,), name=f"rank {r}", daemon=True)
            rank.thread.start()
        try:
            self.ranks[0].turn.release()
            while not self.all_ended.wait(HEARD_WITHIN):
                pass
        except BaseException:  # an interrupt: every rank stops at its next collective
            self.failed = -1
            raise
        finally:
            self.over = True
            put(callers_random)
        for rank in self.ranks:
            assert rank.thread is not None
            rank.thread.join()

    def results(self) -> list[Any]:
        if self.failed is not None:
            error = self.ranks[self.failed].error
            assert error is not None
            if not isinstance(error, Divergence):
                where = self.mesh.coords(self.failed)
                error.add_note(f"raised on simulated rank {self.failed} of {self.mesh}, at {where}")
            raise error
        for started in self.posted.values():
            (work, *_), ranks = started.values(), list(started)
            missing = [r for r in work.fiber if r not in ranks]
            raise Divergence(self.table(f"Ranks {ranks} started {work}; ranks {missing} did not."))
        return [rank.result for rank in self.ranks]

    def post(self, work: _Work) -> None:
        """Add a rank's collective to its fiber's; the last of the fiber computes it for all."""
        key = (work.fiber, work.number)
        others = self.posted.setdefault(key, {})
        others[work.comm.rank] = work
        problem = mismatch(others)
        if problem:
            raise Divergence(self.table(f"{problem}.", work))
        if len(others) == len(work.fiber):
            del self.posted[key]
            works = [others[rank] for rank in work.fiber]
            sent = [(w.op, w.xs) for w in works]
            for place, w in enumerate(works):
                w.result = specification(w.op, place, sent)

    def park(self, r: int, work: _Work) -> None:
        """Let the other ranks run until the whole fiber has started this collective."""
        rank = self.ranks[r]
        rank.awaits, rank.random = work, stand()
        self.pass_turn(r)
        rank.turn.acquire()
        self.resume(r)
        rank.awaits = None

    def resume(self, r: int) -> None:
        rank = self.ranks[r]
        if self.failed is not None:
            raise _Abandoned
        if rank.awaits is not None and rank.awaits.result is None:
            raise Divergence(self.table("A collective was not started by all of its ranks."))
        put(rank.random)

    def pass_turn(self, r: int) -> None:
        """Hand the turn to the next rank that can go on; if none can, to one that will say why."""
        order = [(r + i) % self.mesh.size for i in range(1, self.mesh.size + 1)]
        waiting = [s for s in order if not self.ranks[s].ended]
        ready = [s for s in waiting if self.failed is not None or self.can_go_on(s)]
        if not waiting:
            self.all_ended.set()
        else:
            self.ranks[(ready or waiting)[0]].turn.release()

    def can_go_on(self, s: int) -> bool:
        work = self.ranks[s].awaits
        return work is None or work.result is not None

    def table(self, headline: str, current: _Work | None = None) -> str:
        """Where each rank stands; ``current`` is what the running rank is about to start."""
        states: list[str] = []
        for r, rank in enumerate(self.ranks):
            work = current if current is not None and current.comm.rank == r else rank.awaits
            doing = "running" if work is None else f"at {work}"
            when = self.comms[r].place.when
            states.append("has returned" if rank.ended else f"{when}{doing}{where(rank.thread)}")
        return table(headline, self.mesh, states)
