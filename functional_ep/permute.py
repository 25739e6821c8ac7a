"""Moving rows: each token's row to its K choices, and the choices' rows back, summed.

    spread(x)[i]  = x[order[i] // K]                     [T, D] -> [T K, D]
    collect(y)[t] = sum_k y[inverse[t K + k]]            [T K, D] -> [T, D]
    mix(y, w)[t]  = sum_k w[t, k] y[inverse[t K + k]]    [T K, D], [T, K] -> [T, D]

The first two are each other's transpose. All only gather rows: no scattered addition, no atomics,
the same sums in the same order every time, and nothing of T K rows is written on the way to a sum.
With K = 1 the first two are a permutation and its inverse.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding.node import Node

from .grouped import add


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


def mix(y: Tensor, weights_TK: Tensor, by: Order) -> Tensor:
    """``mix(y, w)[t] = sum_k w[t, k] y[inverse[t K + k]]``: ``(T K, D), (T, K) -> (T, D)``.

    >>> order = sort_order(torch.tensor([1, 0, 0, 1]))
    >>> y = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    >>> mix(y, torch.tensor([[1.0, 0.0], [1.0, 10.0]]), order)
    tensor([[ 3.],
            [42.]])
    """
    return _Mix.apply(y, weights_TK, *by)


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
        return y.index_select(0, inverse) if k == 1 else _sums(y, inverse.view(-1, k))

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


class _Mix(Node):
    @staticmethod
    def forward(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return _sums(y, inverse.view(weights.shape), weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, weights, *by = ctx.saved_tensors
        order = Order(*by)
        rows = spread(grads[0], order, weights.shape[1])
        to_weights = collect((rows * y).sum(-1), order).view(weights.shape)
        return rows * spread(weights.reshape(-1, 1), order), to_weights, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (dy, dw, *_), (y, weights, *by) = tangents, ctx.saved_tensors
        from_y = None if dy is None else _Mix.apply(dy, weights, *by)
        from_w = None if dw is None else _Mix.apply(y, dw, *by)
        return add(from_y, from_w)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        y, weights, *by = args
        dy, dw, *rest = in_dims
        if dw is None:
            lanes = _lanes_inside((dy, *rest), y)
            return _Mix.apply(lanes.flatten(1), weights, *by).unflatten(1, lanes.shape[1:]), 1
        rows = y if dy is None else _lanes_inside((dy, *rest), y)
        rows = collect(rows, Order(*by)).unflatten(0, (weights.movedim(dw, 0).shape[1:]))
        rows = rows.unsqueeze(2) if dy is None else rows
        return (rows * weights.movedim(dw, 2).unsqueeze(-1)).sum(1), 1


def _sums(y: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """``sum_k w_tk y[rows_tk]``, without the products or the rows themselves in memory."""
    rest = y.shape[1:]
    if not y.numel():
        return y.new_zeros(len(rows_TK), *rest)
    flat = y.reshape(len(y), math.prod(rest))
    sums = torch.nn.functional.embedding_bag(
        rows_TK, flat, mode="sum", per_sample_weights=weights_TK
    )
    return sums.view(len(rows_TK), *rest)


def _remember(ctx: Any, inputs: tuple[Any, ...]) -> None:
    _, order, inverse, ctx.k = inputs
    ctx.save_for_backward(order, inverse)
    ctx.save_for_forward(order, inverse)


def _lanes_inside(in_dims: tuple[Any, ...], x: Tensor) -> Tensor:
    if any(dim is not None for dim in in_dims[1:]):
        raise ValueError("rows cannot move in a different order in each lane of a vmap")
    return x.movedim(in_dims[0], 1)
