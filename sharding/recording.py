"""Recording: a comm that writes down which collectives are started and awaited, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .comm import Comm, Op, Work
from .mesh import Mesh
from .simulate import PerRank, simulate


class Event(NamedTuple):
    """A collective was started, or its result was awaited."""

    what: Literal["start", "wait"]
    op: Op
    shapes: tuple[tuple[int, ...], ...]

    @property
    def outline(self) -> tuple[Any, ...]:
        """What has to agree between ranks: all but how many rows an all_to_all moves."""
        rows_differ = self.op.kind == "all_to_all"
        shapes = tuple(shape[1:] if rows_differ else shape for shape in self.shapes)
        return self.what, self.op.kind, self.op.axes, shapes


class Recording(Comm):
    """Another comm, and the list of what it was asked for; what needs no travel is not in it.

    >>> import torch
    >>> def program(comm):
    ...     recording = Recording(comm)
    ...     recording.all_reduce([torch.ones(2)], ("ep",))
    ...     return [(event.what, str(event.op)) for event in recording.events]
    >>> simulate(program, Mesh(ep=2))[0]
    [('start', "all_reduce(axes=('ep',))"), ('wait', "all_reduce(axes=('ep',))")]
    """

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm.mesh, comm.rank)
        self.comm, self.place, self.device = comm, comm.place, comm.device
        self.events: list[Event] = []

    def on(self, mesh: Mesh) -> Recording:
        other = super().on(mesh)
        assert isinstance(other, Recording)
        other.comm = self.comm.on(mesh)  # one list of events for both
        return other

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        shapes = tuple(tuple(x.shape) for x in xs)
        self.events.append(Event("start", op, shapes))
        return _Awaited(self, Event("wait", op, shapes), self.comm.start(op, xs))


class _Awaited(NamedTuple):
    recording: Recording
    event: Event
    work: Work

    def wait(self) -> list[Tensor]:
        self.recording.events.append(self.event)
        return self.work.wait()


def check_symmetry(program: Callable[..., Any], mesh: Mesh, *per_rank: PerRank) -> list[Event]:
    """T13: all ranks start and await the same collectives in the same order; rank 0's are returned.

    Stricter than that the program ends: two fibers that cross in another order on each of their
    ranks are no ``Divergence``, but can block each other on real ranks.

    Args:
        program: called as ``program(comm, *args)`` on every rank, as by ``simulate``.
        mesh: the ranks.
        per_rank: for each argument of the program, a sequence of one value per rank.

    >>> import torch
    >>> symmetric = lambda comm: comm.all_reduce([torch.ones(2)], ("ep",))
    >>> [event.what for event in check_symmetry(symmetric, Mesh(ep=2))]
    ['start', 'wait']
    """

    def recorded(comm: Comm, *args: Any) -> list[Event]:
        recording = Recording(comm)
        program(recording, *args)
        return recording.events

    first, *others = simulate(recorded, mesh, *per_rank)
    for rank, events in enumerate(others, 1):
        mine, theirs = [e.outline for e in first], [e.outline for e in events]
        same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        place = min(len(mine), len(theirs)) if same is None else same
        assert mine == theirs, (
            f"T13 symmetry: rank 0 and rank {rank} of {mesh} part at no. {place}: "
            f"{mine[place : place + 1]} and {theirs[place : place + 1]}"
        )
    return first
