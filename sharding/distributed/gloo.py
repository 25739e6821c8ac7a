"""Links between hosts: gloo's messages. An envelope says what comes, and holds it if it is small.

Envelopes are of one size, since gloo ends the process if a message is larger than its reader
expects. What an envelope has no room for follows in messages whose tag is a digest of what it says,
so that they meet only a reader who expects the same. They do not wait for it to be opened.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharding.buffers import Buffers
from sharding.distributed.link import Mismatch
from sharding.distributed.parcel import ALIGN, Layout, Parcel

SMALL = 1 << 20  # bytes up to which copying a tensor is cheaper than a message of its own
ROOM = 1 << 12  # bytes of an envelope: less than a network carries in the time of one message
HEADER = struct.Struct("=QI")  # bytes of the parcel, bytes of what is said about it
TAGS = (1 << 31) - 1  # envelopes have tag 0


class GlooLink:
    """Messages to and from ``peer`` through the process group."""

    def __init__(self, peer: int, timeout: float, buffers: Buffers) -> None:
        self.peer, self.buffers = peer, buffers
        self.timeout = timedelta(seconds=timeout)
        self.ended = ""

    def send(self, parcel: Parcel) -> Messages:
        envelope = Envelope(parcel.about, parcel.nbytes)
        messages = [torch.frombuffer(envelope.sealed(), dtype=torch.uint8)]
        if envelope.holds_all:
            parcel.write(messages[0][envelope.start : envelope.start + parcel.nbytes])
        else:
            alone, together = _sorted(parcel.xs)
            messages += [parcel.xs[i] for i in alone]
            if together:
                small = Parcel([parcel.xs[i] for i in together], b"")
                messages.append(torch.empty(small.nbytes, dtype=torch.uint8))
                small.write(messages[-1])
        tags = envelope.tags(messages)
        works = [dist.isend(x, self.peer, tag=t) for x, t in zip(messages, tags, strict=True)]
        return Messages(self, works, messages)

    def receive(self, like: Sequence[Tensor], into: bool, about: bytes) -> GlooArrival:
        return GlooArrival(self, like, into, about)

    def gone(self) -> str:
        return self.ended

    def close(self) -> None:
        """The process group is not ours to end."""


class Envelope:
    """What both ranks have to say alike of a parcel.

    >>> Envelope(b"a sum", 8).sealed() == Envelope(b"a sum", 16).sealed()
    False
    """

    def __init__(self, about: bytes, nbytes: int) -> None:
        about = about[: ROOM - HEADER.size]
        self.text = HEADER.pack(nbytes, len(about)) + about
        self.start = -(-len(self.text) // ALIGN) * ALIGN  # of the parcel, if it fits
        self.holds_all = self.start + nbytes <= ROOM

    def sealed(self) -> bytearray:
        """The bytes to send."""
        return bytearray(self.text.ljust(ROOM, b"\0"))

    def tags(self, messages: Sequence[Tensor]) -> list[int]:
        """Of the envelope and of what follows."""
        return [0] + [1 + zlib.crc32(self.text) % TAGS] * (len(messages) - 1)

    def check(self, theirs: bytearray) -> None:
        """Refuse an envelope that says something else."""
        if not theirs.startswith(self.text):
            nbytes, length = HEADER.unpack_from(theirs)
            about = bytes(theirs[HEADER.size : HEADER.size + length])
            raise Mismatch(f"{about.decode(errors='replace')}, {nbytes} bytes")


class Messages:
    """Messages under way, and the memory that must outlive them."""

    def __init__(self, link: GlooLink, works: list[Any], memory: list[Tensor]) -> None:
        self.link, self.works, self.memory = link, works, memory

    def wait(self, leave: int = 0) -> None:
        """Wait until all but the last ``leave`` messages have arrived or left.

        Raises:
            ConnectionError: the other rank has gone.
            TimeoutError: it does not send or take them.
        """
        while len(self.works) > leave:
            try:
                self.works.pop(0).wait(self.link.timeout)
            except RuntimeError as error:
                text = str(error).split("]", 1)[-1].split(". ", 1)[0].strip()  # without the place
                if "timed out" in text.lower():
                    raise TimeoutError(text) from error
                self.link.ended = text
                raise ConnectionError(text) from error


class GlooArrival:
    """Receives from the moment it is made."""

    def __init__(self, link: GlooLink, like: Sequence[Tensor], into: bool, about: bytes) -> None:
        self.out, self.into = list(like), into
        self.alone, self.together = [], list(range(len(like)))
        self.small = Layout(like)
        self.envelope = Envelope(about, self.small.nbytes)
        self.arriving = bytearray(ROOM)
        messages = [torch.frombuffer(self.arriving, dtype=torch.uint8)]
        if not self.envelope.holds_all:
            self.alone, self.together = _sorted(like)
            self.small = Layout([like[i] for i in self.together])
            if not into:
                for i in self.alone:
                    self.out[i] = link.buffers.take(like[i].shape, like[i])
            messages += [self.out[i] for i in self.alone]
            if self.together:
                messages.append(torch.empty(self.small.nbytes, dtype=torch.uint8))
        tags = self.envelope.tags(messages)
        works = [dist.irecv(x, link.peer, tag=t) for x, t in zip(messages, tags, strict=True)]
        self.messages = Messages(link, works, messages)

    def wait(self) -> list[Tensor]:
        self._open()
        memory = self.messages.memory[-1]
        if self.envelope.holds_all:
            memory = memory[self.envelope.start :]
        if self.together:
            arrived = self.small.read(memory)
            for i, x in zip(self.together, arrived, strict=True):
                self.out[i] = self.out[i].copy_(x) if self.into else x
        return self.out

    def release(self) -> None:
        # Nobody may ask for the result, but its memory may go only after the messages have.
        self._open()

    def _open(self) -> None:
        if self.messages.works:
            self.messages.wait(len(self.messages.memory) - 1)
            self.envelope.check(self.arriving)
            self.messages.wait()


def _sorted(xs: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Positions of tensors with a message of their own, and of those that share one."""
    small = [i for i, x in enumerate(xs) if x.nbytes <= SMALL]
    if len(small) < 2:
        return [i for i, x in enumerate(xs) if x.numel()], []
    return [i for i, x in enumerate(xs) if x.nbytes > SMALL], [i for i in small if xs[i].numel()]
