"""Parcels: lists of tensors laid out one behind another, so that one message carries them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sharding.distributed.segments import Segment

ALIGN = 16  # bytes; a multiple of every dtype's size


class Parcel:
    """Tensors on their way to one rank or to several, and what is said about them.

    >>> Parcel([torch.zeros(3), torch.zeros(2, 2)], b"").nbytes
    28
    """

    def __init__(self, xs: Sequence[Tensor], about: bytes) -> None:
        self.xs, self.about = xs, about
        self.written: Segment | None = None  # where it lies, if it does already

    @cached_property
    def nbytes(self) -> int:
        """The size of what :meth:`write` lays out."""
        return size(self.xs)

    def write(self, memory: Tensor) -> None:
        """Lay the tensors out in ``memory``, bytes."""
        for positions, start, end in _regions(self.xs):
            parts = [self.xs[i].reshape(-1) for i in positions]
            torch.cat(parts, out=memory[start:end].view(parts[0].dtype))


def size(like: Sequence[Tensor]) -> int:
    """How many bytes tensors of these shapes and dtypes take, laid out."""
    return max((end for _, _, end in _regions(like)), default=0)


def read(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the shapes and dtypes of ``like``, as they lie in ``memory``.

    >>> memory = torch.zeros(64, dtype=torch.uint8)
    >>> Parcel([torch.tensor([1.0, 2.0])], b"").write(memory)
    >>> read(memory, [torch.empty(2)])
    [tensor([1., 2.])]
    """
    parts = list(like)
    for positions, start, end in _regions(like):
        flat = memory[start:end].view(like[positions[0]].dtype)
        for i, part in zip(
            positions, flat.split([like[i].numel() for i in positions]), strict=True
        ):
            parts[i] = part.view(like[i].shape)
    return parts


def _regions(like: Sequence[Tensor]) -> Iterator[tuple[list[int], int, int]]:
    """For each dtype the positions of its tensors, and where they start and end: no gaps inside."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(like):
        if x.numel():
            groups.setdefault(x.dtype, []).append(i)
    end = 0
    for positions in groups.values():
        start = -(-end // ALIGN) * ALIGN
        end = start + sum(like[i].nbytes for i in positions)
        yield positions, start, end
