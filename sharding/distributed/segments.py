"""Segments: memory without a name that the processes of one machine share."""

from __future__ import annotations

import os

import torch

SMALLEST = 1 << 16


class Segment:
    """Memory of this process that others may map, given its file descriptor."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number, self.nbytes = number, nbytes
        self.fd = os.memfd_create("parcel", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, nbytes)
        self.memory = mapped(self.fd)
        self.readers = 0  # who have not said yet that they have read it
        self.shown: set[int] = set()  # the ranks that have mapped it


class Outbox:
    """The segments that this process sends from, used again once all readers have read them.

    >>> outbox = Outbox()
    >>> first = outbox.take(100_000)
    >>> outbox.take(90_000) is first
    True
    >>> first.readers = 1
    >>> outbox.take(90_000) is first
    False
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def take(self, nbytes: int) -> Segment:
        """A segment of at least so many bytes that nobody reads."""
        free = self.find(nbytes)
        if free is None:
            free = Segment(len(self.segments), _roomy(nbytes))
            self.segments.append(free)
        return free

    def find(self, nbytes: int) -> Segment | None:
        """The smallest of the free segments, if one fits and is not more than twice too large."""
        fitting = [
            segment
            for segment in self.segments
            if not segment.readers and nbytes <= segment.nbytes <= max(SMALLEST, 2 * nbytes)
        ]
        return min(fitting, key=lambda segment: segment.nbytes, default=None)

    def read(self, number: int) -> None:
        """One of the readers has read a segment."""
        self.segments[number].readers -= 1

    def close(self) -> None:
        """Give the descriptors back; the memory goes when nobody maps it any more."""
        for segment in self.segments:
            os.close(segment.fd)
        self.segments = []


def mapped(fd: int) -> torch.Tensor:
    """The memory behind a descriptor, as bytes; it stays when the descriptor is closed."""
    size = os.fstat(fd).st_size
    return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=size, dtype=torch.uint8)


def _roomy(nbytes: int) -> int:
    """Rounded up by an eighth at the most, so that sizes that vary a little recur."""
    grain = max(SMALLEST, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // grain) * grain
