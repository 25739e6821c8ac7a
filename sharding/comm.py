"""Comm: the raw collectives, and the error of ranks that part ways.

A raw collective takes a *list* of tensors and names mesh *axes*, never a process group: every rank
of the fiber along those axes must start the same collective in the same order. ``Comm.start`` does
not block; the result is awaited. One abstract method is all that a new transport has to provide.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .mesh import Axes, Mesh
from .place import Place
from .plain import outside_transforms, plain

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


class Divergence(RuntimeError):
    """The ranks of a fiber did not all start the same collective.

    >>> from sharding import simulate
    >>> def program(comm):
    ...     if comm.rank == 0:
    ...         comm.all_reduce([torch.ones(1)], ("ep",))
    >>> simulate(program, Mesh(ep=2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    sharding.comm.Divergence: A collective was not started by all of its ranks.
    ...
    """


class Op(NamedTuple):
    """One raw collective: what, over which axes and, for all_to_all, how many rows go where.

    ``of`` says what for, if the program has a name for it: ranks must agree on it, and so two that
    have parted ways are told apart even where their tensors look alike.

    >>> print(Op("all_gather", ("ep",), of="blocks/0/w"))
    all_gather(axes=('ep',), of='blocks/0/w')
    """

    kind: Kind
    axes: Axes
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()
    of: str = ""

    def __str__(self) -> str:
        splits = f", send={self.send}, receive={self.receive}" if self.kind == "all_to_all" else ""
        of = f", of={self.of!r}" if self.of else ""
        return f"{self.kind}(axes={self.axes}{splits}{of})"


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> list[Tensor]:
        """The result. It may be awaited once."""
        ...


class Done(NamedTuple):
    """A transfer that needed no travelling."""

    result: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.result


class Then(NamedTuple):
    """``wait() = f(work.wait())``: what is left to do once a transfer has arrived."""

    work: Work
    f: Callable[[list[Tensor]], list[Tensor]]

    def wait(self) -> list[Tensor]:
        return self.f(self.work.wait())


class Listener(Protocol):
    """Hears of every collective that a rank starts, and may listen to its result too."""

    def __call__(self, op: Op, xs: Sequence[Tensor], work: Work) -> Work:
        """What has been started on what; the work to await instead, if only the same."""
        ...


class Comm(ABC):
    """One rank's access to the others: its place on the mesh, and the raw collectives.

    The raw collectives are not differentiable: see :mod:`sharding.collectives`. They leave their
    inputs unchanged; on a fiber of one rank the results are the inputs themselves. Inside of a
    transform they act on the plain tensors, and their results are constants.

    >>> from sharding import simulate
    >>> simulate(lambda comm: (comm.rank, comm.coords, comm.fiber(("ep",))), Mesh(edp=2, ep=2))[3]
    (3, {'edp': 1, 'ep': 1}, (2, 3))
    """

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh = mesh
        self.rank = rank
        self.coords = mesh.coords(rank)
        self.device = torch.device("cpu")  # of what travels without having come from elsewhere
        self.place = Place()
        self.in_flight: dict[int, Work] = {}  # started by a differentiable collective, not awaited
        self.listeners: list[Listener] = []  # one list for all arrangements of the ranks
        self._fibers: dict[Axes, tuple[int, ...]] = {}

    @contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """For the time being, ``listener`` hears of what travels, on other meshes as well.

        >>> from sharding import simulate
        >>> def program(comm):
        ...     heard = []
        ...     with comm.heard_by(lambda op, xs, work: (heard.append(str(op)), work)[1]):
        ...         comm.all_reduce([torch.ones(2)], ("ep",))
        ...     return heard
        >>> simulate(program, Mesh(ep=2))[0]
        ["all_reduce(axes=('ep',))"]
        """
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    @contextmanager
    def letting_go(self) -> Iterator[None]:
        """What an error inside of it leaves in flight is awaited by nobody, and let go."""
        before = set(self.in_flight)
        try:
            yield
        except BaseException:
            for ticket in self.in_flight.keys() - before:
                del self.in_flight[ticket]
            raise

    def on(self, mesh: Mesh) -> Comm:
        """The same ranks, arranged along the axes of another mesh.

        All ranks have to call.

        Raises:
            ValueError: a mesh of another number of ranks.

        >>> from sharding import simulate
        >>> simulate(lambda comm: comm.on(Mesh(edp=2, ep=2)).coords, Mesh(ep=4))[1]
        {'edp': 0, 'ep': 1}
        """
        if mesh.size != self.mesh.size:
            raise ValueError(f"{mesh} has {mesh.size} ranks, but there are {self.mesh.size}")
        other = copy.copy(self)
        other.mesh, other.coords = mesh, mesh.coords(self.rank)
        other.in_flight, other._fibers = {}, {}
        return other

    def at(self, step: int | Tensor) -> None:
        """Step ``step`` begins: the table of ranks that part ways says so.

        >>> from sharding import simulate
        >>> simulate(lambda comm: (comm.at(7), str(comm.place)[:9]), Mesh(ep=2))[0][1]
        'in step 7'
        """
        with suppress(RuntimeError):  # the lanes of a vmap are at no one step
            self.place.begin(int(step))

    def fiber(self, axes: Axes) -> tuple[int, ...]:
        """The ranks of this rank's fiber along ``axes``, in order."""
        known = self._fibers.get(axes) if isinstance(axes, tuple) else None
        if known is None:
            known = self._fibers[axes] = self.mesh.fiber(self.rank, self.mesh.check(axes))
        return known

    def index(self, axes: Axes) -> int:
        """This rank's place in its fiber along ``axes``."""
        return self.fiber(axes).index(self.rank)

    @abstractmethod
    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        """Start a checked collective over a fiber of at least two ranks."""

    def start(self, op: Op, xs: Sequence[Tensor]) -> Work:
        """Start a collective on every tensor of the list; its result is awaited.

        Raises:
            ValueError: an axis not on the mesh; rows that do not fit the fiber or the splits.
        """
        check(op, xs, len(self.fiber(op.axes)))
        if len(self.fiber(op.axes)) == 1 or not xs:
            return Done(list(xs))
        if not torch._C._are_functorch_transforms_active():
            with torch.no_grad():
                work = self._start(op, list(xs))
        else:
            with torch.no_grad(), outside_transforms():
                xs = list(map(plain, xs))
                work = self._start(op, xs)
        for listener in self.listeners:
            work = listener(op, xs, work)
        return work

    def all_gather(self, xs: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        """``[k, ...] -> [n k, ...]``: each tensor of the fiber, concatenated in fiber order."""
        return self.start(Op("all_gather", axes), xs).wait()

    def reduce_scatter(self, xs: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        """``[n k, ...] -> [k, ...]``: this rank's slice of the sum over the fiber."""
        return self.start(Op("reduce_scatter", axes), xs).wait()

    def all_reduce(self, xs: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        """``[...] -> [...]``: the sum over the fiber."""
        return self.start(Op("all_reduce", axes), xs).wait()

    def all_to_all(
        self, xs: Sequence[Tensor], axes: Axes, send: Sequence[int], receive: Sequence[int]
    ) -> list[Tensor]:
        """``send[i]`` rows go to, ``receive[i]`` rows come from, the i-th rank of the fiber."""
        return self.start(Op("all_to_all", axes, tuple(send), tuple(receive)), xs).wait()


def check(op: Op, xs: Sequence[Tensor], ranks: int) -> None:
    """Refuse rows that do not fit the collective, before anything travels."""
    if op.kind == "reduce_scatter":
        for x in xs:
            if x.dim() == 0 or x.shape[0] % ranks:
                raise ValueError(
                    f"{op}: {tuple(x.shape)} does not divide into {ranks} ranks along dim 0: pad it"
                )
    elif op.kind == "all_gather":
        for x in xs:
            if x.dim() == 0:
                raise ValueError(f"{op}: a scalar has no dim 0 to gather along: reshape it to (1,)")
    elif op.kind == "all_to_all":
        if len(op.send) != ranks or len(op.receive) != ranks:
            raise ValueError(f"{op}: one split per rank is needed, and there are {ranks} ranks")
        for x in xs:
            if x.dim() == 0 or x.shape[0] != sum(op.send):
                raise ValueError(
                    f"{op}: {tuple(x.shape)} has not sum(send) = {sum(op.send)} rows along dim 0"
                )
