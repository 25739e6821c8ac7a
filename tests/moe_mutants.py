"""Plausible bugs in a mixture of experts, to be planted: every law rejects those that break it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from moe_cases import Moe, Weights, as_routing
from torch import Tensor

from functional_ep.moe import Dispatched, combine, dispatch, expert_ffn, moe
from functional_ep.permute import Order, collect
from functional_ep.routing import Routing
from sharding import Comm
from sharding.mesh import Axes


def composed(
    dispatch: Callable[..., Dispatched] = dispatch, combine: Callable[..., Tensor] = combine
) -> Moe:
    """A mixture of experts made of these parts."""

    def run(weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm) -> Tensor:
        experts = routing.probs_TE.shape[-1]
        way = dispatch(x_TD, routing.ids_TK, experts, axes, comm)
        rows_RD = expert_ffn(weights["gate_up"], weights["down"], way.rows_RD, way.counts_e)
        return combine(rows_RD, routing.scores_TK, way, axes, comm)

    return run


def rerouted(change: Callable[[Tensor, int, Axes, Comm], Tensor]) -> Moe:
    """The library's mixture of experts, with other ids: ``change(ids, experts, axes, comm)``."""

    def run(weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm) -> Tensor:
        experts = routing.probs_TE.shape[-1]
        ids_TK = change(routing.ids_TK, experts, axes, comm)
        return moe(weights, x_TD, as_routing(ids_TK, routing.scores_TK, experts), axes, comm)

    return run


def _swap(order: Order | None) -> Any:
    return order and Order(order.inverse, order.order)


def combine_by_the_permutation(
    rows_RD: Tensor, scores_TK: Tensor, way: Dispatched, *on: Any
) -> Tensor:
    """Instead of by its inverse."""
    return combine(rows_RD, scores_TK, way._replace(by_expert=_swap(way.by_expert)), *on)


def return_by_the_permutation(
    rows_RD: Tensor, scores_TK: Tensor, way: Dispatched, *on: Any
) -> Tensor:
    """The same on the receiving side."""
    return combine(rows_RD, scores_TK, way._replace(on_arrival=_swap(way.on_arrival)), *on)


def combine_with_unsorted_scores(
    rows_RD: Tensor, scores_TK: Tensor, way: Dispatched, *on: Any
) -> Tensor:
    """Rows are sorted by expert, their scores are not."""
    scores = collect(scores_TK.reshape(-1, 1), way.by_expert)
    return combine(rows_RD, scores.view_as(scores_TK), way, *on)


def combine_without_scores(rows_RD: Tensor, scores_TK: Tensor, way: Dispatched, *on: Any) -> Tensor:
    return combine(rows_RD, torch.ones_like(scores_TK), way, *on)


def combine_with_constant_scores(
    rows_RD: Tensor, scores_TK: Tensor, way: Dispatched, *on: Any
) -> Tensor:
    """The router learns nothing."""
    return combine(rows_RD, scores_TK.detach(), way, *on)


def dispatch_constants(x_TD: Tensor, *rest: Any) -> Dispatched:
    """Tokens get no gradient from the experts."""
    return dispatch(x_TD.detach(), *rest)


def leave_rows_as_they_came(x_TD: Tensor, *rest: Any) -> Dispatched:
    """Received rows are taken to be sorted by expert; they are sorted by sender."""
    way = dispatch(x_TD, *rest)
    return (
        way
        if way.on_arrival is None
        else way._replace(rows_RD=collect(way.rows_RD, way.on_arrival))
    )


def count_ones_own_choices(
    x_TD: Tensor, ids_TK: Tensor, experts: int, axes: Axes, comm: Comm
) -> Dispatched:
    """Local instead of global: what this rank's tokens chose, not what its experts received."""
    way = dispatch(x_TD, ids_TK, experts, axes, comm)
    counts, local = ids_TK.flatten().bincount(minlength=experts), len(way.counts_e)
    mine = counts[comm.index(axes) * local :][:local]
    return way._replace(counts_e=tuple(mine.tolist()))


def scale_expert_gradients(
    weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm
) -> Tensor:
    """By the number of ranks along the expert axes."""
    more = comm.mesh.count(axes) - 1
    scaled = {name: w + more * (w - w.detach()) for name, w in weights.items()}
    return moe(scaled, x_TD, routing, axes, comm)


def number_axes_backwards(
    weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm
) -> Tensor:
    return moe(weights, x_TD, routing, axes[::-1], comm)


def deal_experts_out(ids_TK: Tensor, experts: int, axes: Axes, comm: Comm) -> Tensor:
    """Expert i on rank i modulo ranks, instead of in blocks."""
    ranks = comm.mesh.count(axes)
    return ids_TK % ranks * (experts // ranks) + ids_TK // ranks


def count_from_ones_own_experts(ids_TK: Tensor, experts: int, axes: Axes, comm: Comm) -> Tensor:
    """A rank takes its own experts for the first ones."""
    start = comm.index(axes) * (experts // comm.mesh.count(axes))
    return (ids_TK + start) % experts


def forget_the_last_expert(ids_TK: Tensor, experts: int, axes: Axes, comm: Comm) -> Tensor:
    """A histogram with one bin too few."""
    return ids_TK.clamp(max=max(0, experts - 2))


def skip_without_tokens(
    weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm
) -> Tensor:
    """A shortcut that strands the ranks which do have tokens."""
    return moe(weights, x_TD, routing, axes, comm) if len(x_TD) else x_TD


def touch_every_expert(
    weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm
) -> Tensor:
    """Zero times every weight, as is done to have a gradient for each; what is not finite stays."""
    zero = torch.stack([0 * w.sum() for w in weights.values()]).sum()
    return moe(weights, x_TD, routing, axes, comm) + zero


def start_from_one(
    weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm
) -> Tensor:
    """Gradients of experts accumulate onto something that is not zero."""
    residue = torch.stack([w.sum() for w in weights.values()]).sum()
    return moe(weights, x_TD, routing, axes, comm) + (residue - residue.detach())
