"""Moving rows: each token's row to its K choices, and the choices' rows back, summed.

    spread(x)[i]  = x[order[i] // K]                     [T, D] -> [T K, D]
    collect(y)[t] = sum_k y[inverse[t K + k]]            [T K, D] -> [T, D]

Each is the transpose of the other and both only gather rows: no scattered addition, no atomics, the
same sums in the same order every time. With K = 1 they are a permutation and its inverse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding.node import Node


class Order(NamedTuple):
    """A permutation of T K rows, and its inverse."""

    order: Tensor
    inverse: Tensor


def sort_order(keys: Tensor) -> Order:
    """The stable order that sorts integer keys.

    >>> sort_order(torch.tensor([1, 0, 1])).order
    tensor([1, 0, 2])
    """
    order = torch.argsort(keys, stable=True)
    numbers = torch.arange(order.numel(), device=order.device)
    return Order(order, torch.empty_like(order).scatter_(0, order, numbers))


def spread(x: Tensor, by: Order, choices: int = 1) -> Tensor:
    """``spread(x)[i] = x[order[i] // K]``: ``(T, ...) -> (T K, ...)``; transpose: :func:`collect`.

    >>> spread(torch.tensor([[1.0], [2.0]]), sort_order(torch.tensor([1, 0, 0, 1])), choices=2)
    tensor([[1.],
            [2.],
            [1.],
            [2.]])
    """
    return _Spread.apply(x, *by, choices)


def collect(y: Tensor, by: Order, choices: int = 1) -> Tensor:
    """``collect(y)[t] = sum_k y[inverse[t K + k]]``: ``(T K, ...) -> (T, ...)``.

    >>> order = sort_order(torch.tensor([1, 0, 0, 1]))
    >>> collect(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), order, 2)
    tensor([[4.],
            [6.]])
    """
    return _Collect.apply(y, *by, choices)


class _Spread(Node):
    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        return x.index_select(0, order if k == 1 else order.div(k, rounding_mode="floor"))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Collect.apply(grads[0], *ctx.saved_tensors, ctx.k), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Spread.apply(tangents[0], *ctx.saved_tensors, ctx.k)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _Spread.apply(_lanes_inside(in_dims, args[0]), *args[1:]), 1


class _Collect(Node):
    @staticmethod
    def forward(y: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        rows = y.index_select(0, inverse)
        return rows if k == 1 else rows.view(len(y) // k, k, *y.shape[1:]).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Spread.apply(grads[0], *ctx.saved_tensors, ctx.k), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Collect.apply(tangents[0], *ctx.saved_tensors, ctx.k)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _Collect.apply(_lanes_inside(in_dims, args[0]), *args[1:]), 1


def _remember(ctx: Any, inputs: tuple[Any, ...]) -> None:
    _, order, inverse, ctx.k = inputs
    ctx.save_for_backward(order, inverse)
    ctx.save_for_forward(order, inverse)


def _lanes_inside(in_dims: tuple[Any, ...], x: Tensor) -> Tensor:
    if any(dim is not None for dim in in_dims[1:]):
        raise ValueError("rows cannot move in a different order in each lane of a vmap")
    return x.movedim(in_dims[0], 1)
