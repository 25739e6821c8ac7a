"""Grouped products as a loop over experts, on CPU in few shapes where each shape has a price.

oneDNN compiles a kernel for every shape of a product of two-byte floats, in ten times the time of
the product, and keeps the last thousand, a gigabyte. Experts get another number of rows at every
call: what is multiplied is that number rounded up, so that shapes return and kernels with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_compiled(x: Tensor) -> bool:
    """Whether products with ``x`` run in a kernel that is compiled for their shape."""
    return x.device.type == "cpu" and x.itemsize == 2


def rounded(rows: int) -> int:
    """The least of 32, 64, 96 and then ``2^k`` or ``3 2^k`` that holds the rows.

    Others than multiples of 32, which a tile of the processor holds, are not any faster.

    >>> [rounded(rows) for rows in (1, 32, 33, 65, 97, 129, 193)]
    [32, 32, 64, 96, 128, 192, 256]
    """
    step = 1 << max(rows - 1, 127).bit_length() - 2
    return -(-rows // step) * step


def mm_by_expert(x: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
    """``y_e = x_e w_e^T`` for contiguous rows.

    A rounded product goes on into the rows of the next experts; their own are written over it.

    >>> mm_by_expert(torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]]), [1, 2])
    tensor([[2.],
            [4.],
            [4.]])
    """
    y = x.new_empty(len(x), w.shape[1])
    size = rounded if is_compiled(x) else int
    start = 0
    for rows, w_e in zip(counts, w.mT.unbind(), strict=True):
        end, far = start + rows, start + size(rows)
        if rows and far <= len(x):
            torch.mm(x[start:far], w_e, out=y[start:far])
        elif rows:
            y[start:end] = torch.mm(_followed_by_zeros(x[start:end]), w_e)[:rows]
        start = end
    return y


def outer_by_expert(g: Tensor, x: Tensor, counts: Sequence[int]) -> Tensor:
    """``o_e = g_e^T x_e`` for contiguous rows; those of zeros that follow them add nothing.

    >>> outer_by_expert(torch.ones(3, 1), torch.ones(3, 2), [1, 2])
    tensor([[[1., 1.]],
    <BLANKLINE>
            [[2., 2.]]])
    """
    o = x.new_empty(len(counts), g.shape[1], x.shape[1])
    gs, xs = g.split_with_sizes(list(counts)), x.split_with_sizes(list(counts))
    for rows, g_e, x_e, o_e in zip(counts, gs, xs, o.unbind(), strict=True):
        if rows and is_compiled(x):
            g_e, x_e = _followed_by_zeros(g_e), _followed_by_zeros(x_e)
        if rows:
            torch.mm(g_e.t(), x_e, out=o_e)
        else:
            o_e.zero_()
    return o


def _followed_by_zeros(x: Tensor) -> Tensor:
    """The rows, up to a number that others have as well."""
    missing = rounded(len(x)) - len(x)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x
