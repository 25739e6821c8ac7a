"""Small tensors share one message: a message has a price whatever its size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .comm import Kind

SMALL = 1 << 20  # bytes up to which copying a tensor is cheaper than a message of its own


def pack(
    kind: Kind, xs: list[Tensor], ranks: int
) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]:
    """``unpack(collective(packed)) = collective(xs)``, with one tensor for all small ones.

    Small tensors of one dtype are laid out as the columns of a matrix with a row per rank of the
    result (all_gather) or of the input (reduce_scatter), so that the collective acts on its rows.

    >>> packed, unpack = pack("all_gather", [torch.tensor([1.0]), torch.tensor([2.0, 3.0])], 2)
    >>> packed
    [tensor([1., 2., 3.])]
    >>> unpack([torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])])
    [tensor([1., 4.]), tensor([2., 3., 5., 6.])]
    """
    groups: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(xs):
        if x.nbytes <= SMALL:
            groups.setdefault(x.dtype, []).append(i)
    shared = [group for group in groups.values() if len(group) > 1]
    if not shared:
        return xs, lambda ys: ys
    inside = {i for group in shared for i in group}
    alone = [i for i in range(len(xs)) if i not in inside]
    rows = ranks if kind == "reduce_scatter" else 1
    packed = [xs[i] for i in alone]
    packed += [torch.cat([xs[i].reshape(rows, -1) for i in g], 1).view(-1) for g in shared]

    def unpack(ys: list[Tensor]) -> list[Tensor]:
        out: list[Tensor] = list(xs)
        for i, y in zip(alone, ys, strict=False):
            out[i] = y
        for group, y in zip(shared, ys[len(alone) :], strict=True):
            columns = [xs[i].numel() // rows for i in group]
            results = y.view(ranks if kind == "all_gather" else 1, -1).split(columns, 1)
            for i, result in zip(group, results, strict=True):
                out[i] = result.reshape(_result_shape(kind, xs[i], ranks))
        return out

    return packed, unpack


def _result_shape(kind: Kind, x: Tensor, ranks: int) -> tuple[int, ...]:
    if kind == "all_gather":
        return (len(x) * ranks, *x.shape[1:])
    if kind == "reduce_scatter":
        return (len(x) // ranks, *x.shape[1:])
    return tuple(x.shape)
