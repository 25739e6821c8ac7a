"""Routing: which experts see a token, with what weight, and the losses that keep them in balance.

Shape suffixes: T tokens, D model, E experts, K choices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sharding.closed import closed, is_mapped

from .wide import wide


class Routing(NamedTuple):
    """What the router decided. Expert ids are global."""

    ids_TK: Tensor
    scores_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor


def route(logits_TE: Tensor, k: int, normalise: bool = True) -> Routing:
    """``scores = top-k of softmax(logits)``, divided by their sum if ``normalise``.

    Softmax and scores are computed in float32 or wider.

    Args:
        logits_TE: one logit per token and expert.
        k: choices per token, from 1 to E.
        normalise: whether a token's scores add up to one.

    Raises:
        ValueError: k out of range.

    >>> route(torch.tensor([[0.0, 1.0, 2.0]]), k=2).ids_TK
    tensor([[2, 1]])
    """
    experts = logits_TE.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"top-{k} of {experts} experts: choose k from 1 to {experts}")
    logits_TE = wide(logits_TE)
    probs_TE = torch.softmax(logits_TE, -1)
    scores_TK, ids_TK = probs_TE.topk(k, dim=-1)
    if normalise:
        scores_TK = scores_TK / scores_TK.sum(-1, keepdim=True)
    return Routing(ids_TK, scores_TK, probs_TE, logits_TE)


def count_experts(ids_TK: Tensor, experts: int) -> Tensor:
    """``counts_E[e] = how many choices fell on global expert e``, int64.

    Raises:
        ValueError: an id that is no expert. On a GPU, where to know that is to wait for it, it is
            left out instead, and :func:`functional_ep.moe.dispatch` finds that it is missing.

    >>> count_experts(torch.tensor([[0, 2], [2, 1]]), experts=4)
    tensor([1, 1, 2, 0])
    """
    if is_mapped(ids_TK):
        return closed(lambda ids_TK: (count_experts(ids_TK, experts),), lanes="loop")(ids_TK)[0]
    if ids_TK.device.type != "cpu":
        return _counted(ids_TK.reshape(-1), experts)
    try:
        counts_E = torch.bincount(ids_TK.reshape(-1), minlength=experts)
    except RuntimeError:  # of a negative id
        raise ValueError(f"expert id {int(ids_TK.min())}: ids are 0 to {experts - 1}") from None
    if counts_E.numel() != experts:
        raise ValueError(f"expert id {counts_E.numel() - 1}: ids are 0 to {experts - 1}")
    return counts_E


def _counted(ids: Tensor, experts: int) -> Tensor:
    """The same with nothing read: bincount asks for the largest id to know how much it counts."""
    slots = ids.clamp(-1, experts) + 1  # the first and the last are of no expert
    ones = slots.new_ones(1, dtype=torch.int64).expand_as(slots)
    return ones.new_zeros(experts + 2).scatter_add_(0, slots, ones)[1:-1]


class Statistics(NamedTuple):
    """Sums over one layer's local tokens, from which auxiliary losses and metrics are made."""

    counts_E: Tensor
    probs_E: Tensor
    z: Tensor


def statistics(routing: Routing, valid_T: Tensor | None = None) -> Statistics:
    """``counts_E, sum_t p_t, sum_t logsumexp(logits_t)^2`` over tokens that are not padding."""
    experts = routing.probs_TE.shape[-1]
    ids_TK, probs_TE = routing.ids_TK, routing.probs_TE
    z_T = torch.logsumexp(routing.logits_TE, -1).square()
    if valid_T is None:
        return Statistics(count_experts(ids_TK, experts), probs_TE.sum(0), z_T.sum())
    weight_T = valid_T.to(probs_TE.dtype)
    # Choices of padding are counted as those of an expert more, and left out.
    counted_TK = torch.where(valid_T[:, None], ids_TK, experts)
    counts_E = count_experts(counted_TK, experts + 1)[:-1]
    return Statistics(counts_E, weight_T @ probs_TE, weight_T @ z_T)


def balance_loss(probs_E: Tensor, global_counts_E: Tensor) -> Tensor:
    """``E sum_e f_e sum_t p_te`` over local tokens t, f the global fractions of choices.

    Summed over all ranks and divided by the number of tokens it is the load-balancing loss of
    Switch Transformers, ``E sum_e f_e P_e``: 1 at perfect balance. The fractions are statistics of
    all ranks (reduce ``counts_E`` first) and carry no gradient, so that the sum of local gradients
    is the gradient of the global loss on every mesh.

    Source: Fedus, Zoph, Shazeer, Switch Transformers, 2021, eq. 4 to 6.

    >>> balance_loss(torch.tensor([2.0, 2.0]), torch.tensor([3, 3]))
    tensor(4.)
    """
    counts_E = global_counts_E.to(probs_E.dtype)  # integers would divide in float32
    fractions_E = counts_E / counts_E.sum().clamp(min=1)
    return probs_E.shape[-1] * (fractions_E * probs_E).sum()
