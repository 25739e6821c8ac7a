"""Grouped products: one matrix product per expert, over rows sorted by expert.

    grouped_mm(x, w)_e    = x_e w_e^T       [R, I], [e, O, I] -> [R, O]
    grouped_outer(g, x)_e = g_e^T x_e       [R, O], [R, I] -> [e, O, I]

Each is bilinear and the other is its transpose, so the two are closed under every derivative; lanes
of a vmap become more rows, more columns or more experts of one product. Each result is one tensor,
written in place: an expert without rows costs nothing but its zero gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharding.closed import closed
from sharding.node import Node
from sharding.plain import outside_transforms, plain

from .factored import Factored, goes_in_factors
from .few_shapes import mm_by_expert, outer_by_expert


def grouped_mm(x: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
    """``y_e = x_e w_e^T``: rows ``(R, I)`` sorted by expert, weights ``(e, O, I)`` -> ``(R, O)``.

    Args:
        x: rows; the first ``counts[0]`` belong to expert 0, and so on.
        w: one matrix per expert, output dim first.
        counts: rows per expert, on the host; they add up to R.

    Raises:
        ValueError: counts that do not add up to the rows, or are not one per expert.

    >>> grouped_mm(torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]]), [1, 2])
    tensor([[2.],
            [4.],
            [4.]])
    """
    return _GroupedMm.apply(x, w, fitting(counts, x.shape[0], w.shape[0]))


def grouped_outer(g: Tensor, x: Tensor, counts: Sequence[int]) -> Tensor:
    """``o_e = g_e^T x_e``: rows ``(R, O)`` and ``(R, I)`` sorted by expert -> ``(e, O, I)``.

    Raises:
        ValueError: counts that do not add up to the rows of both.

    >>> grouped_outer(torch.ones(3, 1), torch.ones(3, 2), [1, 2])
    tensor([[[1., 1.]],
    <BLANKLINE>
            [[2., 2.]]])
    """
    if not sum(counts) == g.shape[0] == x.shape[0]:
        raise ValueError(
            f"grouped_outer: counts {tuple(counts)} for {g.shape[0]} and {x.shape[0]} rows"
        )
    return _GroupedOuter.apply(g, x, _known(counts))


def weight_gradient(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
    """``grouped_outer(g, x)``, in a backward pass of a node whose second input has the weights.

    In factors, if whoever asked for the gradient is better served by them.
    """
    if goes_in_factors(ctx.next_functions[1][0], g, x, ctx.counts):
        return Factored.of(g, x, ctx.counts)
    return _GroupedOuter.apply(g, x, ctx.counts)


class Counts(tuple[int, ...]):
    """Rows per expert, and where each expert's rows end, worked out once for all products.

    >>> Counts([1, 2]).ends(torch.device("cpu"))
    tensor([1, 3], dtype=torch.int32)
    """

    device_counts: Tensor | None = None
    found: Tensor | None = None

    @classmethod
    def read(cls, numbers: Sequence[int], counts_e: Tensor) -> Counts:
        """Numbers that were read from a device, which need not be sent there again."""
        counts = cls(numbers)
        counts.device_counts = plain(counts_e)
        return counts

    def ends(self, device: torch.device) -> Tensor:
        if self.found is None or self.found.device != device:
            self.found = self._ends(device)
        return self.found

    def on(self, device: torch.device) -> Tensor:
        """The numbers, on a device, which may be where they were read from."""
        if self.device_counts is not None and self.device_counts.device == device:
            return self.device_counts
        return torch.tensor(self, device=device)

    def _ends(self, device: torch.device) -> Tensor:
        with outside_transforms():
            return self.on(device).cumsum(0, dtype=torch.int32)


def fitting(counts: Sequence[int], rows: int, experts: int) -> Counts:
    """The counts, or an error if they are not of so many rows and experts."""
    if len(counts) != experts or sum(counts) != rows:
        raise ValueError(
            f"grouped_mm: counts {tuple(counts)} for {rows} rows and {experts} experts"
        )
    return _known(counts)


def _known(counts: Sequence[int]) -> Counts:
    return counts if isinstance(counts, Counts) else Counts(counts)


def _has_kernel(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped kernel is the better way; on CPU it is a loop too, in less Python."""
    dtype = torch.bfloat16 if a.is_cuda else torch.float32
    return a.dtype == dtype and _is_aligned(a) and _is_aligned(b)


def _is_aligned(x: Tensor) -> bool:
    """Whether rows, or columns, are contiguous and begin at multiples of 16 bytes."""
    size, (down, across) = x.shape[-1], x.stride()[-2:]
    if across != 1:
        size, down, across = x.shape[-2], across, down
    whole = across == 1 and down >= size > 0 and x.shape[0] > 0
    return whole and not (down * x.itemsize % 16 or x.data_ptr() % 16)


class _GroupedMm(Node):
    @staticmethod
    def forward(x: Tensor, w: Tensor, counts: Counts) -> Tensor:
        x = x.contiguous()
        if _has_kernel(x, w):
            return torch.nn.functional.grouped_mm(x, w.mT, offs=counts.ends(x.device))
        return mm_by_expert(x, w, counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, ctx.counts = inputs
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,), (x, w) = grads, ctx.saved_tensors
        to_x, to_w, _ = ctx.needs_input_grad
        dx = _GroupedMm.apply(g, w.mT, ctx.counts) if to_x else None
        return dx, weight_gradient(ctx, g, x) if to_w else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (dx, dw, _), (x, w) = tangents, ctx.saved_tensors
        from_x = None if dx is None else _GroupedMm.apply(dx, w, ctx.counts)
        from_w = None if dw is None else _GroupedMm.apply(x, dw, ctx.counts)
        return add(from_x, from_w)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        x, w, counts = args
        lanes, (dx, dw, _) = info.batch_size, in_dims
        if dw is None:  # more rows of each expert
            x = x.movedim(dx, 1)
            y = _GroupedMm.apply(x.flatten(0, 1), w, Counts(c * lanes for c in counts))
            return y.unflatten(0, (x.shape[0], lanes)), 1
        w = w.movedim(dw, 1)  # e, lanes, O, I
        if dx is None:  # more columns
            y = _GroupedMm.apply(x, w.flatten(1, 2), counts)
            return y.unflatten(1, (lanes, w.shape[2])), 1
        x, w = x.movedim(dx, 0), w.transpose(0, 1)  # more experts
        y = _GroupedMm.apply(x.flatten(0, 1), w.flatten(0, 1), Counts(counts * lanes))
        return y.unflatten(0, (lanes, x.shape[1])), 0


class _GroupedOuter(Node):
    @staticmethod
    def forward(g: Tensor, x: Tensor, counts: Counts) -> Tensor:
        g, x = g.contiguous(), x.contiguous()
        if not _has_kernel(g, x):
            return outer_by_expert(g, x, counts)
        o = torch.nn.functional.grouped_mm(g.t(), x, offs=counts.ends(x.device))
        if o.is_cuda and not all(counts):  # pytorch/pytorch#172439: on Blackwell they are left
            idle = [o_e for o_e, rows in zip(o.unbind(), counts, strict=True) if not rows]
            torch._foreach_zero_(idle)
        return o

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, x, ctx.counts = inputs
        ctx.save_for_backward(g, x)
        ctx.save_for_forward(g, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (c,), (g, x) = grads, ctx.saved_tensors
        to_g, to_x, _ = ctx.needs_input_grad
        dg = _GroupedMm.apply(x, c, ctx.counts) if to_g else None
        return dg, _GroupedMm.apply(g, c.mT, ctx.counts) if to_x else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (dg, dx, _), (g, x) = tangents, ctx.saved_tensors
        from_g = None if dg is None else _GroupedOuter.apply(dg, x, ctx.counts)
        from_x = None if dx is None else _GroupedOuter.apply(g, dx, ctx.counts)
        return add(from_g, from_x)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        g, x, counts = args
        lanes, (dg, dx, _) = info.batch_size, in_dims
        if dx is None:
            g = g.movedim(dg, 1)  # R, lanes, O: more rows of the result
            o = _GroupedOuter.apply(g.flatten(1), x, counts)
            return o.unflatten(1, (lanes, g.shape[2])), 1
        if dg is None:
            x = x.movedim(dx, 1)  # R, lanes, I: more columns of the result
            o = _GroupedOuter.apply(g, x.flatten(1), counts)
            return o.unflatten(2, (lanes, x.shape[2])), 2
        g, x = g.movedim(dg, 0), x.movedim(dx, 0)  # more experts
        o = _GroupedOuter.apply(g.flatten(0, 1), x.flatten(0, 1), Counts(counts * lanes))
        return o.unflatten(0, (lanes, len(counts))), 0


def add(a: Tensor | None, b: Tensor | None) -> Tensor:
    """The sum of two tangents, of which one may be absent."""
    if a is None or b is None:
        present = b if a is None else a
        assert present is not None
        return present
    # A node of its own: torch turns forward mode off in a jvp, for all levels and not just this.
    return closed(lambda a, b: (a + b,))(a, b)[0]
