"""Cross-entropy that keeps the logits and holds nothing else of their size but their gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharding.closed import closed, pull_back
from sharding.node import Node

from .wide import wide

IGNORE = -100  # the label of a position without a target, as in torch's cross_entropy
AT_ONCE = 1 << 18  # logits; as many as stay in a core's cache between one pass and the next
AT_ONCE_ON_GPU = 1 << 25  # 128 MiB: few launches, and little memory beside the logits


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """``sum_t logsumexp(z_t) - z_t[target_t]`` over tokens with a target, in float32 or wider.

    A few tokens at a time: no probabilities and no wider copy of all logits, forward or backward.
    Closed under every transform.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    return _CrossEntropy.apply(logits_TV, targets_T)


class _CrossEntropy(Node):
    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> Tensor:
        n = _tokens_at_once(logits)
        pieces = zip(logits.split(n), targets.split(n), strict=True)
        return torch.stack([_formula(z, t)[0] for z, t in pieces]).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Slope.apply(*ctx.saved_tensors, grads[0]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        # A node of its own: torch turns forward mode off in here, for all levels and not just this.
        return closed(_push_forward)(*ctx.saved_tensors, tangents[0])[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return closed(torch.vmap(_formula, in_dims))(*args)[0], 0


class _Slope(Node):
    """``logits, targets, g -> g (softmax(z_t) - [target_t])``, zero where there is no target."""

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, g: Tensor) -> Tensor:
        n, slope = _tokens_at_once(logits), logits.new_empty(logits.shape)
        pieces = zip(logits.split(n), targets.split(n), slope.split(n), strict=True)
        for z, t, out in pieces:
            logits = wide(z)
            probs = torch.softmax(logits, -1, out=out if logits is z else None)
            has_target = (t != IGNORE).to(probs.dtype)[:, None]
            probs.scatter_add_(-1, t.clamp(min=0)[:, None], -has_target)
            probs.mul_(has_target * g)
            if probs is not out:
                out.copy_(probs)
        return slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        again = closed(lambda *args: pull_back(_slope, args[:3], args[3:]))
        to_logits, to_g = again(*ctx.saved_tensors, grads[0])
        return to_logits, None, to_g

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        logits, targets, g = ctx.saved_tensors
        d_logits, _, d_g = tangents
        d_logits = torch.zeros_like(logits) if d_logits is None else d_logits
        d_g = torch.zeros_like(g) if d_g is None else d_g
        return closed(_push_slope)(logits, targets, g, d_logits, d_g)[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return closed(torch.vmap(_slope, in_dims))(*args)[0], 0


def _tokens_at_once(logits: Tensor) -> int:
    at_once = AT_ONCE_ON_GPU if logits.is_cuda else AT_ONCE
    return max(1, at_once // logits.shape[-1])


def _formula(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
    return (F.cross_entropy(wide(logits), targets, ignore_index=IGNORE, reduction="sum"),)


def _slope(logits: Tensor, targets: Tensor, g: Tensor) -> tuple[Tensor]:
    """:class:`_Slope` in operations that are differentiable to any order."""
    probs = wide(logits).softmax(-1)
    has_target = (targets != IGNORE).to(probs.dtype)[:, None]
    at_target = targets.clamp(min=0)[:, None] == torch.arange(probs.shape[-1], device=probs.device)
    return ((g * has_target * (probs - at_target.to(probs.dtype))).to(logits.dtype),)


def _push_forward(logits: Tensor, targets: Tensor, tangent: Tensor) -> tuple[Tensor]:
    (slope,) = _slope(wide(logits), targets, tangent.new_ones((), dtype=wide(logits).dtype))
    return ((slope * tangent).sum(),)


def _push_slope(
    logits: Tensor, targets: Tensor, g: Tensor, d_logits: Tensor, d_g: Tensor
) -> tuple[Tensor]:
    # A dual tensor cannot be made of an expanded one, which a cotangent often is.
    primals, moved = (logits.contiguous(), g.contiguous()), (d_logits.contiguous(), d_g)
    return (torch.func.jvp(lambda z, g: _slope(z, targets, g)[0], primals, moved)[1],)
