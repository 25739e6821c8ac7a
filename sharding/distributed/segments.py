"""Segments: memory without a name that the processes of one machine share."""

from __future__ import annotations

import os

import torch

SMALLEST = 1 << 16


class Segment:
    """Memory of this process that others may map, given its file descriptor."""

    def __init__(self, number: int) -> None:
        self.number, self.nbytes, self.fd = number, 0, -1
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.readers = 0  # who have not said yet that they have read it
        self.shown: set[int] = set()  # the ranks that have mapped it

    def grow(self, nbytes: int) -> None:
        """Other memory, of at least so many bytes; the old goes when nobody maps it any more."""
        self.close()
        self.nbytes = _roomy(nbytes)
        self.fd = os.memfd_create("parcel", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.nbytes)
        self.memory = mapped(self.fd)
        self.shown = set()

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class Outbox:
    """The segments that this process sends from, used again once all readers have read them.

    There are as many as were ever on their way at a time.

    >>> outbox = Outbox()
    >>> first = outbox.take(100_000)
    >>> outbox.take(200_000) is first
    True
    >>> first.readers = 1
    >>> outbox.take(100_000) is first
    False
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def take(self, nbytes: int) -> Segment:
        """The smallest free segment that is large enough; else the largest grows."""
        free = self.free
        fitting = [segment for segment in free if segment.nbytes >= nbytes]
        if fitting:
            return min(fitting, key=lambda segment: segment.nbytes)
        segment = max(free, key=lambda segment: segment.nbytes, default=None)
        if segment is None:
            segment = Segment(len(self.segments))
            self.segments.append(segment)
        segment.grow(nbytes)
        return segment

    @property
    def free(self) -> list[Segment]:
        """Segments that nobody reads."""
        return [segment for segment in self.segments if not segment.readers]

    def read(self, number: int) -> None:
        """One of the readers has read a segment."""
        self.segments[number].readers -= 1

    def close(self) -> None:
        """Give all descriptors back."""
        for segment in self.segments:
            segment.close()
        self.segments = []


def mapped(fd: int) -> torch.Tensor:
    """The memory behind a descriptor, as bytes; it stays when the descriptor is closed."""
    size = os.fstat(fd).st_size
    return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=size, dtype=torch.uint8)


def _roomy(nbytes: int) -> int:
    """Rounded up by an eighth at the most, so that sizes that vary a little recur."""
    grain = max(SMALLEST, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // grain) * grain
