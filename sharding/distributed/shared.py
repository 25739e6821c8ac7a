"""Links within a host: parcels lie in shared memory, and a socket says where.

A parcel is written once, for all of its readers, and read where it lies: no copy through the
kernel, no thread that wakes up for it. What goes through the socket is a *notice*: which parcel,
what it claims to be, and which of the other side's segments have been read. A small parcel is part
of its notice. The memory has no name, so nothing is left behind by a process that dies.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from sharding.distributed.link import Mismatch
from sharding.distributed.parcel import Layout, Parcel
from sharding.distributed.segments import Outbox, Segment, mapped

INLINE = 1 << 14  # bytes up to which a parcel travels with its notice
LARGE = 1 << 20  # bytes from which a segment is given back at once rather than with the next notice
HEADER = struct.Struct("=iQHH")  # segment (or INSIDE, NOTHING), bytes, segments read, about
INSIDE, NOTHING = -1, -2
DESCRIPTOR = socket.CMSG_SPACE(array("i").itemsize)
ROOM = INLINE + (1 << 12)
FREED = 256  # segments that a notice gives back at the most
ALIGN = 16  # bytes; what a small parcel starts at a multiple of
ENDED = "its process has ended"


class Notice(NamedTuple):
    """A parcel that has come: what it claims to be, and its memory."""

    about: bytes
    nbytes: int
    segment: int
    memory: Tensor


class SharedLink:
    """Parcels to and from ``peer``, a process of the same host, over a connected socket."""

    def __init__(
        self, peer: int, connection: socket.socket, outbox: Outbox, timeout: float
    ) -> None:
        self.peer, self.socket, self.outbox, self.timeout = peer, connection, outbox, timeout
        self.neighbours: list[SharedLink] = [self]  # all links of this rank
        self.ended = False
        whole, part = divmod(int(timeout * 1e6), 1_000_000)
        patience = struct.pack("ll", whole, part)  # a timeval; without a system call per message
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        self.maps: dict[int, Tensor] = {}  # the peer's segments
        self.awaited = self.arrived = 0  # parcels, counted
        self.notices: dict[int, Notice] = {}  # arrived and not read yet, by that count
        self.unwanted: set[int] = set()
        self.freed: list[int] = []  # segments of the peer that it has not been told are free

    def send(self, parcel: Parcel) -> None:
        if parcel.nbytes <= INLINE:
            payload = torch.empty(parcel.nbytes, dtype=torch.uint8)
            parcel.write(payload)
            self._notify(INSIDE, parcel, ctypes.string_at(payload.data_ptr(), parcel.nbytes))
            return
        segment = self._segment(parcel)
        segment.readers += 1
        new = self.peer not in segment.shown
        segment.shown.add(self.peer)
        self._notify(segment.number, parcel, fd=segment.fd if new else None)

    def receive(self, like: Sequence[Tensor], into: bool, about: bytes) -> SharedArrival:
        self.awaited += 1
        return SharedArrival(self, self.awaited, like, into, about)

    def gone(self) -> str:
        if self.socket.fileno() < 0:
            return ""
        hung_up = select.poll()
        hung_up.register(self.socket, 0)
        return ENDED if hung_up.poll(0) else ""

    def close(self) -> None:
        self.socket.close()
        self.maps, self.notices = {}, {}

    def take(self, number: int) -> Notice:
        """The parcel of this number, when it has come."""
        while self.arrived < number:
            self._hear()
        return self.notices.pop(number)

    def drop(self, number: int) -> None:
        """Nobody will take the parcel of this number."""
        if number in self.notices:
            self.free(self.notices.pop(number))
        elif self.arrived < number:
            self.unwanted.add(number)

    def free(self, notice: Notice) -> None:
        """The parcel has been read."""
        if notice.segment < 0:
            return
        self.freed.append(notice.segment)
        if notice.nbytes >= LARGE or len(self.freed) >= FREED:
            with suppress(ConnectionError):  # who has gone needs no memory back
                self._notify(NOTHING)

    def _segment(self, parcel: Parcel) -> Segment:
        if parcel.written is None:
            if parcel.nbytes >= LARGE and not self.outbox.free:
                poll = select.poll()
                poll.register(self.socket, select.POLLIN)
                while poll.poll(0):  # it may have been given back
                    self._hear()
            parcel.written = self.outbox.take(parcel.nbytes)
            parcel.write(parcel.written.memory)
        return parcel.written

    def _notify(
        self, segment: int, parcel: Parcel | None = None, inside: bytes = b"", fd: int | None = None
    ) -> None:
        about, nbytes = (b"", 0) if parcel is None else (parcel.about, parcel.nbytes)
        freed, self.freed = array("i", self.freed[:FREED]), self.freed[FREED:]
        header = HEADER.pack(segment, nbytes, len(freed), len(about))
        message = b"".join((header, freed.tobytes(), about))
        if inside:
            message = message.ljust(_aligned(len(message)), b"\0") + inside
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        while True:
            try:
                self.socket.sendmsg([message], rights, socket.MSG_DONTWAIT)
                return
            except BlockingIOError:  # the peer may be waiting for us to read, as we are for it
                self._until_writable()

    def _until_writable(self) -> None:
        """Meanwhile listen to everybody: in a ring, each waits for one who waits for another."""
        ready, links = select.poll(), {link.socket.fileno(): link for link in self.neighbours}
        for number, link in links.items():
            if not link.ended:
                ready.register(number, select.POLLIN | (select.POLLOUT if link is self else 0))
        events = ready.poll(self.timeout * 1e3)
        if not events:
            raise TimeoutError(f"rank {self.peer} reads no messages")
        for number, event in events:
            link = links[number]
            if event & select.POLLIN:
                try:
                    link._hear()
                except ConnectionError:
                    link.ended = True
                    if link is self:
                        raise
            elif link is not self:
                link.ended = True  # an error on its socket, which its own transfers will report

    def _hear(self) -> None:
        """The next notice."""
        message = bytearray(ROOM)
        try:
            n, rights, flags, _ = self.socket.recvmsg_into([message], DESCRIPTOR)
        except BlockingIOError:
            raise TimeoutError(f"no message for {self.timeout:g} s") from None
        if not n:
            raise ConnectionError(ENDED)
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise OSError("a descriptor could not be received: too many files are open (ulimit -n)")
        segment, nbytes, freed, about = HEADER.unpack_from(message)
        start = HEADER.size + freed * array("i").itemsize
        for number in array("i", bytes(message[HEADER.size : start])):
            self.outbox.read(number)
        if segment == NOTHING:
            return
        for _, _, data in rights:
            (fd,) = array("i", data[: array("i").itemsize])
            self.maps[segment] = mapped(fd)
            os.close(fd)
        self._arrive(segment, nbytes, message, start, start + about)

    def _arrive(self, segment: int, nbytes: int, message: bytearray, start: int, end: int) -> None:
        if segment != INSIDE:
            memory = self.maps[segment]
        elif nbytes:
            offset = _aligned(end)
            memory = torch.frombuffer(message, dtype=torch.uint8, offset=offset, count=nbytes)
        else:
            memory = torch.empty(0, dtype=torch.uint8)
        notice = Notice(bytes(message[start:end]), nbytes, segment, memory)
        self.arrived += 1
        if self.arrived in self.unwanted:
            self.unwanted.discard(self.arrived)
            self.free(notice)
        else:
            self.notices[self.arrived] = notice


class SharedArrival:
    """A parcel that is awaited, by its number among those of its link."""

    def __init__(
        self, link: SharedLink, number: int, like: Sequence[Tensor], into: bool, about: bytes
    ) -> None:
        self.link, self.number, self.into, self.about = link, number, into, about
        self.layout = Layout(like)
        self.notice: Notice | None = None

    def wait(self) -> list[Tensor]:
        notice = self.notice = self.link.take(self.number)
        if (notice.about, notice.nbytes) != (self.about, self.layout.nbytes):
            raise Mismatch(f"{notice.about.decode(errors='replace')}, {notice.nbytes} bytes")
        parts = self.layout.read(notice.memory)
        if not self.into:
            return parts
        into = list(self.layout.like)
        torch._foreach_copy_(into, parts)
        return into

    def release(self) -> None:
        if self.notice is None:
            self.link.drop(self.number)
        else:
            self.link.free(self.notice)


def _aligned(end: int) -> int:
    return -(-end // ALIGN) * ALIGN
