"""Tape: what a rank was sent in a stretch of a program, and a comm that plays it to it alone.

The numbers that a rank computes depend on what it was given and on the results of its collectives,
in the order in which it started them. With those it can be run again without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .comm import Comm, Divergence, Op, Work
from .mesh import Mesh

Digest = Callable[[Sequence[Tensor]], list[str]]


class Asked(NamedTuple):
    """A collective as a rank started it: all that is to be the same when it is played again."""

    op: Op
    sent: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    def __str__(self) -> str:
        shapes = ", ".join(f"{str(dtype)[6:]}{list(shape)}" for dtype, shape in self.sent)
        return f"{self.op} of [{shapes}]"


class Heard:
    """A collective on a tape. ``received`` is None as long as nobody has awaited it."""

    def __init__(self, asked: Asked, digests: list[str]) -> None:
        self.asked, self.digests = asked, digests
        self.received: list[Tensor] | None = None


class Tape:
    """Hears what a rank starts, and keeps what it receives; numbered in the order of the starts.

    Args:
        digest: of the tensors of a collective, a text for each; what was sent is not kept itself.

    >>> from sharding import simulate
    >>> def program(comm):
    ...     tape = Tape(lambda xs: [str(x.tolist()) for x in xs])
    ...     with comm.heard_by(tape):
    ...         comm.all_reduce([torch.ones(1)], ("ep",))
    ...     return tape.heard
    >>> heard = simulate(program, Mesh(ep=2))[0]
    >>> print(heard[0].asked, heard[0].digests, heard[0].received)
    all_reduce(axes=('ep',)) of [float32[1]] ['[1.0]'] [tensor([2.])]
    """

    def __init__(self, digest: Digest) -> None:
        self.digest = digest
        self.heard: list[Heard] = []

    def __call__(self, op: Op, xs: Sequence[Tensor], work: Work) -> Work:
        heard = Heard(asked(op, xs), self.digest(xs))
        self.heard.append(heard)
        return _Kept(work, heard)


class _Kept(NamedTuple):
    work: Work
    heard: Heard

    def wait(self) -> list[Tensor]:
        received = self.work.wait()
        self.heard.received = [x.detach().clone() for x in received]  # may be changed in place
        return received


def asked(op: Op, xs: Sequence[Tensor]) -> Asked:
    """A collective without its numbers."""
    return Asked(op, tuple((x.dtype, tuple(x.shape)) for x in xs))


class Replayed(Comm):
    """One rank of a mesh, alone: collectives are answered from a tape, which runs between marks.

    Raises:
        Divergence: from a collective that is not the one on the tape.

    >>> heard = Heard(asked(Op("all_reduce", ("ep",)), [torch.ones(1)]), ["-"])
    >>> heard.received = [torch.tensor([2.0])]
    >>> comm = Replayed(Mesh(ep=2), 1, [heard], lambda xs: ["-"])
    >>> comm.play()
    >>> comm.all_reduce([torch.zeros(1)], ("ep",))
    [tensor([2.])]
    """

    def __init__(self, mesh: Mesh, rank: int, heard: Sequence[Heard], digest: Digest) -> None:
        super().__init__(mesh, rank)
        self.heard, self.digest = heard, digest
        self.playing: list[int] = []  # the next number; one list for all arrangements of the ranks
        self.other: list[str] = []  # the collectives that were sent other numbers

    def play(self) -> None:
        """From here on the tape answers."""
        self.playing.append(0)

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        found = asked(op, xs)
        if not self.playing:
            raise Divergence(
                f"{found} before the recorded step: rank {self.rank} is alone here, and can only "
                "be answered in the step; take state and batches from the recording"
            )
        number = self.playing[0]
        self.playing[0] += 1
        if number == len(self.heard):
            raise Divergence(f"{found} is asked for, but the recording ends after {number}")
        heard = self.heard[number]
        if found != heard.asked:
            raise Divergence(
                f"collective no. {number} of the recording is {heard.asked}; the program asks for "
                f"{found}: it is not the program that was recorded"
            )
        if self.digest(xs) != heard.digests:
            self.other.append(f"collective no. {number}, {found}")
        return _Answer(number, heard, [x.device for x in xs])

    def check_end(self) -> None:
        """Refuse a program that has asked for less than there is.

        Raises:
            Divergence: with the next collective on the tape.
        """
        number = self.playing[0]
        if number < len(self.heard):
            raise Divergence(
                f"the program has ended before collective no. {number} of the recording, "
                f"{self.heard[number].asked}: it is not the program that was recorded"
            )


class _Answer(NamedTuple):
    number: int
    heard: Heard
    devices: list[torch.device]

    def wait(self) -> list[Tensor]:
        if self.heard.received is None:
            raise Divergence(
                f"collective no. {self.number}, {self.heard.asked}: in the recording nothing was "
                "received. There the step ended before, or did not ask for it"
            )
        device = self.devices[0]
        return [x.to(device, copy=True) for x in self.heard.received]
