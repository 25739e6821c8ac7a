"""Ops that move numbers, told backwards: which boxes of its inputs a box of the result is made of.

An op that is not among them is computed, from the whole of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from functional_ep.box import Box, sizes_of, slices_of

Fill = Callable[[Tensor, Box], None]
"""Write a box of a tensor into a tensor of the box's shape, in the dtype of the latter."""

aten = torch.ops.aten


class Readable(Protocol):
    """A tensor of which boxes can be read."""

    @property
    def fill(self) -> Fill: ...
    @property
    def shape(self) -> Sequence[int]: ...
    def dim(self) -> int: ...


def whole_of(x: Readable) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in x.shape)


def _same(result: Tensor, x: Readable, **_: Any) -> Fill:
    return x.fill


def _cat(result: Tensor, xs: Sequence[Readable], dim: int = 0) -> Fill:
    dim %= result.dim()

    def fill(out: Tensor, box: Box) -> None:
        (lo, hi), start = box[dim], 0
        for x in xs:
            end = start + x.shape[dim]
            first, last = max(lo, start), min(hi, end)
            if first < last:
                part = out.narrow(dim, first - lo, last - first)
                x.fill(part, (*box[:dim], (first - start, last - start), *box[dim + 1 :]))
            start = end

    return fill


def _stack(result: Tensor, xs: Sequence[Readable], dim: int = 0) -> Fill:
    dim %= result.dim()

    def fill(out: Tensor, box: Box) -> None:
        lo, hi = box[dim]
        for i in range(lo, hi):
            xs[i].fill(out.select(dim, i - lo), box[:dim] + box[dim + 1 :])

    return fill


def _transpose(result: Tensor, x: Readable, dim0: int, dim1: int) -> Fill:
    a, b = sorted((dim0 % result.dim(), dim1 % result.dim()))

    def fill(out: Tensor, box: Box) -> None:
        swapped = list(box)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        x.fill(out.transpose(a, b), tuple(swapped))

    return fill


def _shifted(x: Readable, dim: int, by: int) -> Fill:
    def fill(out: Tensor, box: Box) -> None:
        lo, hi = box[dim]
        x.fill(out, (*box[:dim], (lo + by, hi + by), *box[dim + 1 :]))

    return fill


def _split(results: Sequence[Tensor], x: Readable, _: Any, dim: int = 0) -> list[Fill]:
    dim %= x.dim()
    starts = [sum(y.shape[dim] for y in results[:i]) for i in range(len(results))]
    return [_shifted(x, dim, start) for start in starts]


def _select(result: Tensor, x: Readable, dim: int, index: int) -> Fill:
    dim, index = dim % x.dim(), index % x.shape[dim]
    return lambda out, box: x.fill(out.unsqueeze(dim), (*box[:dim], (index, index + 1), *box[dim:]))


def _unbind(results: Sequence[Tensor], x: Readable, dim: int = 0) -> list[Fill]:
    return [_select(y, x, dim, i) for i, y in enumerate(results)]


def _squeeze(result: Tensor, x: Readable, dim: int) -> Fill:
    return _select(result, x, dim, 0) if result.dim() < x.dim() else x.fill


def _unsqueeze(result: Tensor, x: Readable, dim: int) -> Fill:
    dim %= result.dim()
    return lambda out, box: x.fill(out.squeeze(dim), box[:dim] + box[dim + 1 :])


def _view(result: Tensor, x: Readable, _: Any) -> Fill:
    """Leading dims that stay as they are keep their ranges; what is reshaped is read whole."""
    pairs = zip(result.shape, x.shape, strict=False)
    kept = next((i for i, (a, b) in enumerate(pairs) if a != b), min(result.dim(), x.dim()))

    def fill(out: Tensor, box: Box) -> None:
        rows = box[:kept]
        whole = out.new_empty((*sizes_of(rows), *x.shape[kept:]))
        x.fill(whole, (*rows, *whole_of(x)[kept:]))
        reshaped = whole.view(*sizes_of(rows), *result.shape[kept:])
        out.copy_(reshaped[(..., *slices_of(box[kept:]))])

    return fill


def compute(func: Any) -> Callable[..., Any]:
    """The rule of any other op: run it, in the dtype that is asked for."""

    def rule(results: Any, *args: Any, **kwargs: Any) -> Any:
        def run(dtype: torch.dtype) -> Any:
            def load(x: Any) -> Any:
                if not hasattr(x, "fill"):
                    return x
                whole = torch.empty(x.shape, dtype=dtype)
                x.fill(whole, whole_of(x))
                return whole

            real = tree_map(load, (args, kwargs))
            return func(*real[0], **real[1])

        if isinstance(results, Tensor):
            return lambda out, box: out.copy_(run(out.dtype)[slices_of(box)])
        return [
            lambda out, box, i=i: out.copy_(run(out.dtype)[i][slices_of(box)])
            for i in range(len(results))
        ]

    return rule


RULES: dict[Any, Callable[..., Any]] = {
    aten.clone.default: _same,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.transpose.int: _transpose,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.squeeze.dim: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}
