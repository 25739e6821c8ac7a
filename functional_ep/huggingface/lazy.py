"""Lazy tensors: ops on them move no number, and any box of a result can be read from its inputs.

transformers converts weights by stacking, concatenating, splitting, transposing and reshaping. Its
own code runs on lazy tensors, so it alone says what belongs where; of the result a rank reads its
interval, and of the files only what this interval is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from functional_ep.box import Box, boxes, sizes_of, slices_of
from functional_ep.huggingface.moves import RULES, Fill, compute


class Lazy(Tensor):
    """``fill(out, box)``: out = x[box], for a tensor x that is nowhere in memory.

    >>> x = Lazy.of(torch.arange(6.0).view(2, 3))
    >>> y = torch.cat([x, x.transpose(0, 1).contiguous().view(2, 3)])
    >>> read(y, 4, 9)
    tensor([4., 5., 0., 3., 1.])
    """

    meta: Tensor
    fill: Fill
    inputs: tuple[Lazy, ...]

    @staticmethod
    def __new__(cls: type[Lazy], meta: Tensor, fill: Fill, inputs: tuple[Lazy, ...] = ()) -> Lazy:
        x: Lazy = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=meta.device
        )
        x.meta, x.fill, x.inputs = meta, fill, inputs
        return x

    @classmethod
    def stored(cls, shape: Sequence[int], dtype: torch.dtype, fill: Fill) -> Lazy:
        """A tensor that something else can read."""
        return cls(torch.empty(tuple(shape), dtype=dtype, device="meta"), fill)

    @classmethod
    def of(cls, x: Tensor) -> Lazy:
        """A tensor in memory."""
        return cls.stored(x.shape, x.dtype, _Held(x))

    def sources(self) -> Iterator[Lazy]:
        """The stored tensors that this one is computed from."""
        if not self.inputs:
            yield self
        for x in self.inputs:
            yield from x.sources()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} changes its input, which a lazy tensor cannot")
        metas = tree_map(_meta, (tuple(args), kwargs))
        results = func(*metas[0], **metas[1])
        inputs = tuple(x for x in tree_iter((args, kwargs)) if isinstance(x, Lazy))
        rule = RULES.get(func, compute(func))
        fills = rule(results, *args, **kwargs)
        if isinstance(results, Tensor):
            return cls(results, fills, inputs)
        return [cls(y, fill, inputs) for y, fill in zip(results, fills, strict=True)]


def read(x: Lazy, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
    """``ravel(x)[lo:hi]``, into ``out`` if given, in the dtype of ``out``.

    >>> read(Lazy.of(torch.arange(6).view(2, 3)), 2, 5)
    tensor([2, 3, 4])
    """
    out = torch.empty(hi - lo, dtype=x.dtype) if out is None else out
    start = 0
    for box in boxes(lo, hi, tuple(x.shape)):
        sizes = sizes_of(box)
        x.fill(out[start : start + math.prod(sizes)].view(sizes), box)
        start += math.prod(sizes)
    return out


class _Held(NamedTuple):
    """Fills from a tensor in memory."""

    x: Tensor

    def __call__(self, out: Tensor, box: Box) -> None:
        out.copy_(self.x[slices_of(box)])


def _meta(x: Any) -> Any:
    return x.meta if isinstance(x, Lazy) else x
