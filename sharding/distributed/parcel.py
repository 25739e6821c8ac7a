"""Parcels: lists of tensors laid out one behind another, so that one message carries them all."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from sharding.comm import Op
from sharding.distributed.segments import Segment
from sharding.divergence import MOST, kinds

ALIGN = 16  # bytes; a multiple of every dtype's size
LONGEST, SHORT = 900, 300  # characters of the names of tensors, and of what they belong to


class Layout:
    """Where tensors of these shapes and dtypes lie: those of a dtype without gaps between them.

    >>> memory = torch.zeros(64, dtype=torch.uint8)
    >>> Parcel([torch.tensor([1.0, 2.0])], b"").write(memory)
    >>> Layout([torch.empty(2)]).read(memory)
    [tensor([1., 2.])]
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.like = like
        groups: dict[torch.dtype, list[int]] = {}
        for i, x in enumerate(like):
            if x.numel():
                groups.setdefault(x.dtype, []).append(i)
        self.regions: list[tuple[list[int], int, int]] = []  # positions, first and last byte
        self.nbytes = 0
        for positions in groups.values():
            start = -(-self.nbytes // ALIGN) * ALIGN
            self.nbytes = start + sum([like[i].nbytes for i in positions])
            self.regions.append((positions, start, self.nbytes))

    def read(self, memory: Tensor) -> list[Tensor]:
        """The tensors, as they lie in ``memory``, bytes."""
        like, parts = self.like, list(self.like)
        for positions, start, end in self.regions:
            flat = memory[start:end].view(like[positions[0]].dtype)
            if len(positions) == 1:
                parts[positions[0]] = flat.view(like[positions[0]].shape)
                continue
            cut = flat.split_with_sizes([like[i].numel() for i in positions])
            for i, part in zip(positions, cut, strict=True):
                parts[i] = part.view(like[i].shape)
        return parts


class Parcel:
    """Tensors on their way to one rank or to several, and what is said about them.

    >>> Parcel([torch.zeros(3), torch.zeros(2, 2)], b"").nbytes
    28
    """

    def __init__(self, xs: Sequence[Tensor], about: bytes) -> None:
        self.xs, self.about = xs, about
        self.layout = Layout(xs)
        self.nbytes = self.layout.nbytes
        self.written: Segment | None = None  # where it lies, if it does already

    def write(self, memory: Tensor) -> None:
        """Lay the tensors out in ``memory``, bytes."""
        for positions, start, end in self.layout.regions:
            place = memory[start:end].view(self.xs[positions[0]].dtype)
            if len(positions) == 1:
                place.view(self.xs[positions[0]].shape).copy_(self.xs[positions[0]])
            else:
                torch.cat([self.xs[i].reshape(-1) for i in positions], out=place)


def kinds_of(op: Op, xs: Sequence[Tensor]) -> str:
    """Dtypes and shapes, but for how many rows go where: those may differ between ranks."""
    skip = 1 if op.kind == "all_to_all" else 0
    text = kinds(xs, skip)
    if len(xs) <= MOST and len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}, in all {hash(tuple([tuple(x.shape[skip:]) for x in xs])) % 2**32:x}"


def about(op: Op, kinds: str) -> bytes:
    """What all ranks of a fiber say alike of a collective, however long its name is."""
    name = repr(op.of) if op.of else ""
    if len(name) > SHORT:
        name = f"{name[:SHORT]}, in all {crc32(name.encode()):x}"
    return f"{op.kind}(axes={op.axes}{', of=' if name else ''}{name}) of {kinds}".encode()
