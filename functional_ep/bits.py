"""Bits: a digest of tensors that is exact on every device, at the speed of reading them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROW = 8 * 4095  # bytes: an odd number of words, or an even one of equal changes would cancel
LARGE = 2**16  # bytes from which a tensor is worth launches of its own
FACTOR = -0x61C8864680B583EB  # odd, of no pattern: 2^64 over the golden ratio
OTHER = -0x40A7B892E31B1A47


def digest(xs: Sequence[Tensor]) -> Tensor:
    """``sum of f_i mix(row_i) + sum of g_j mix(column_j)`` modulo 2^64, of tensors in rows.

    Rows and columns are sums of 64-bit words, and the factors f and g depend on the place. Any
    difference changes it but by a chance of 1 in 2^64 or so, unless it adds up to nothing in each
    row and in each column; rounding of sums does not exist. Numbers that are equal but for their
    bits, as 0 and -0, differ. Returns an int64 scalar on the device of the tensors.

    >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    >>> bool(digest([a]) == digest([a.clone()])), bool(digest([a]) == digest([b]))
    (True, False)
    """
    rest: list[Tensor] = []
    wholes: list[Tensor] = []
    for x in xs:
        flat = in_order(x.detach().reshape(-1)).view(torch.uint8)
        cut = flat.numel() - flat.numel() % ROW if flat.numel() >= LARGE else 0
        if cut:
            wholes.append(_aligned(flat[:cut]))
        rest.append(flat[cut:])
    if not rest:
        return torch.zeros((), dtype=torch.int64)
    together = torch.cat(rest)
    wholes.append(torch.nn.functional.pad(together, (0, -together.numel() % ROW)))
    rows = [flat.view(torch.int64).view(-1, ROW // 8) for flat in wholes]
    # Sums first, and then products, cost no memory of the size of the tensors.
    of_rows = torch.cat([words.sum(1) for words in rows])
    of_columns = torch.stack([words.sum(0) for words in rows]).view(-1)
    sums = _mixed(torch.cat([of_rows, of_columns]))
    return (sums * _factors(sums)).sum()


def _mixed(sums: Tensor) -> Tensor:
    """One to one, and each bit has to do with many.

    A change of the highest bit alone stays there, whatever it is multiplied by: a second one in
    another place would undo it.
    """
    spread = sums * OTHER
    spread = (spread ^ (spread >> 32 & 0xFFFFFFFF)) * FACTOR
    return spread ^ (spread >> 29 & 0x7FFFFFFFF)


def in_order(x: Tensor) -> Tensor:
    """The tensor itself if its numbers lie in order, else a copy whose do.

    >>> in_order(torch.ones(1).expand(3)).stride()
    (1,)
    """
    # A single number counts as contiguous whatever its stride is; looking at its bytes does not.
    ordinary = x.is_contiguous() and (x.dim() == 0 or x.stride(-1) == 1)
    return x if ordinary else x.clone(memory_format=torch.contiguous_format)


def _factors(like: Tensor) -> Tensor:
    """Odd, so that no bit is lost, and without a pattern."""
    mixed = torch.arange(1, len(like) + 1, device=like.device) * FACTOR
    return (mixed ^ (mixed >> 29)) * OTHER | 1


def _aligned(flat: Tensor) -> Tensor:
    """Words can be read where one may begin."""
    return flat.clone() if flat.storage_offset() % 8 or flat.data_ptr() % 8 else flat
