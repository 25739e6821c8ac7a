"""Mixture of experts: ``route -> dispatch -> expert_ffn -> combine``, each a pure function.

Shape suffixes: T tokens, D model, F hidden, E experts, e local experts, K choices, R received
rows. Expert ids are global; the ranks along the expert axes hold ``e = E / ranks`` of them each,
in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharding.closed import closed, is_mapped
from sharding.collectives import all_to_all
from sharding.comm import Comm
from sharding.mesh import Axes

from .grouped import Counts, grouped_mm
from .permute import Order, collect, mix, sort_order, spread
from .routing import Routing, count_experts
from .swiglu import swiglu_mm


class Dispatched(NamedTuple):
    """Rows at the experts that they chose, and the way back."""

    rows_RD: Tensor  # sorted by local expert
    counts_e: Counts  # how many of them belong to each local expert
    by_expert: Order  # this rank's T K choices, sorted by global expert
    on_arrival: Order | None  # received rows, sorted by local expert; None: they came in order
    sent: tuple[int, ...]  # rows to each rank of the expert axes
    received: tuple[int, ...]  # rows from each


def dispatch(x_TD: Tensor, ids_TK: Tensor, experts: int, axes: Axes, comm: Comm) -> Dispatched:
    """A row of ``x`` for every choice, at the rank and in the place of the chosen expert.

    Expert ``q E/n + j`` is local expert j of the q-th of the n ranks along ``axes``. A rank without
    tokens and an expert without rows are ordinary: every rank takes part in every exchange.

    Args:
        x_TD: this rank's tokens.
        ids_TK: their choices, global ids.
        experts: E, the number of experts over all ranks.
        axes: the mesh axes that split the experts; none: all are local.
        comm: the ranks.

    Raises:
        ValueError: shapes that do not fit, ids that are no experts, or experts that do not divide
            by the ranks.

    >>> from sharding import Mesh, simulate
    >>> x, ids = torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [0]])
    >>> simulate(lambda comm: dispatch(x, ids, 2, ("ep",), comm).rows_RD.tolist(), Mesh(ep=2))
    [[[2.0], [2.0]], [[1.0], [1.0]]]
    """
    ranks = comm.mesh.count(axes)
    if x_TD.dim() != 2 or ids_TK.dim() != 2 or len(x_TD) != len(ids_TK):
        raise ValueError(
            f"dispatch: tokens {tuple(x_TD.shape)} and ids {tuple(ids_TK.shape)}, which have to be "
            "(T, D) and (T, K)"
        )
    if ids_TK.is_floating_point():
        raise ValueError(f"dispatch: ids are {ids_TK.dtype}, and have to be integers")
    if experts % ranks:
        raise ValueError(f"{experts} experts do not divide by the {ranks} ranks along {axes}")
    counts_E = count_experts(ids_TK, experts)
    by_expert = sort_order(ids_TK.reshape(-1))
    rows = spread(x_TD, by_expert, ids_TK.shape[-1])
    if ranks == 1:
        counts = Counts.read(_all_counted(counts_E.tolist(), ids_TK, experts), counts_E)
        return Dispatched(rows, counts, by_expert, None, (), ())
    local = experts // ranks
    even = (local,) * ranks
    (arriving,) = comm.all_to_all([counts_E], axes, even, even)
    arriving_qe = arriving.view(ranks, local)
    # Splits have to reach the host; one transfer brings all of them.
    leaving_q = counts_E.view(ranks, local).sum(1)
    numbers = torch.cat([leaving_q, arriving_qe.sum(1), arriving_qe.sum(0)])
    host = tuple(numbers.tolist())
    sent, received, counts_e = host[:ranks], host[ranks : 2 * ranks], host[2 * ranks :]
    _all_counted(sent, ids_TK, experts)
    rows = all_to_all(rows, axes, comm, sent, received)
    local_ids = torch.arange(local, device=rows.device).repeat(ranks)
    on_arrival = sort_order(torch.repeat_interleave(local_ids, arriving, output_size=sum(received)))
    counts = Counts.read(counts_e, numbers[2 * ranks :])
    return Dispatched(spread(rows, on_arrival), counts, by_expert, on_arrival, sent, received)


def _all_counted(counts: Sequence[int], ids_TK: Tensor, experts: int) -> Sequence[int]:
    """These counts, once they are on the host; or an error if some ids are no experts."""
    strays = ids_TK.numel() - sum(counts)
    if strays:
        raise ValueError(f"{strays} of {ids_TK.numel()} expert ids are not from 0 to {experts - 1}")
    return counts


def expert_ffn(gate_up: Tensor, down: Tensor, rows_RD: Tensor, counts_e: tuple[int, ...]) -> Tensor:
    """``down_e (silu(gate_e x) * up_e x)`` for each row x of local expert e: SwiGLU.

    Args:
        gate_up: ``(e, 2F, D)``, gate above up.
        down: ``(e, D, F)``.
        rows_RD: sorted by local expert.
        counts_e: rows per local expert.
    """
    return swiglu_mm(grouped_mm(rows_RD, gate_up, counts_e), down, counts_e)


def bring_back(rows_RD: Tensor, dispatched: Dispatched, axes: Axes, comm: Comm) -> Tensor:
    """The rows back at the rank of their tokens, one for every choice: the inverse of dispatch.

    >>> from sharding import Mesh, simulate
    >>> x, ids = torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [0]])
    >>> def program(comm):
    ...     way = dispatch(x, ids, 2, ("ep",), comm)
    ...     return bring_back(way.rows_RD, way, ("ep",), comm).flatten()
    >>> simulate(program, Mesh(ep=2))
    [tensor([1., 2.]), tensor([1., 2.])]
    """
    return collect(_returned(rows_RD, dispatched, axes, comm), dispatched.by_expert)


def combine(
    rows_RD: Tensor,
    scores_TK: Tensor,
    dispatched: Dispatched,
    axes: Axes,
    comm: Comm,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``y_t = sum_k score_tk row_tk``: the rows back at their tokens, weighed and summed.

    They travel as they are, and are summed in ``dtype``, by default their own.
    """
    rows = _returned(rows_RD, dispatched, axes, comm)
    wide = dtype or rows.dtype
    return mix(rows.to(wide), scores_TK.to(wide), dispatched.by_expert)


def _returned(rows: Tensor, way: Dispatched, axes: Axes, comm: Comm) -> Tensor:
    """Rows at the rank of their tokens, sorted by global expert."""
    if way.on_arrival is None:
        return rows
    rows = collect(rows, way.on_arrival)
    return all_to_all(rows, axes, comm, way.received, way.sent)


def moe(
    experts: Mapping[str, Tensor], x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm
) -> Tensor:
    """``y_t = sum_k score_tk FFN_{id_tk}(x_t)``, for experts that other ranks may hold.

    Differentiable to any order in the experts, the tokens and the scores, and closed under ``vmap``
    (lanes that route differently run one after another). Rows travel and experts compute in the
    dtype of their weights, which ``torch.autocast`` does not change: ``Precision`` of a plan does.
    They are summed in the dtype of the tokens.

    Args:
        experts: this rank's view, ``gate_up (e, 2F, D)`` and ``down (e, D, F)``.
        x_TD: this rank's tokens.
        routing: where they go.
        axes: the mesh axes that split the experts.
        comm: the ranks; all of a fiber along ``axes`` must call.

    >>> from sharding import Mesh, simulate
    >>> from functional_ep.routing import route
    >>> experts = {"gate_up": torch.ones(2, 2, 1), "down": torch.ones(2, 1, 1)}
    >>> def program(comm):
    ...     x = torch.ones(3, 1)
    ...     mine = {name: w[comm.rank :][:1] for name, w in experts.items()}
    ...     return moe(mine, x, route(torch.zeros(3, 2), k=2), ("ep",), comm)
    >>> simulate(program, Mesh(ep=2))[0].flatten()
    tensor([0.7311, 0.7311, 0.7311])
    """
    total = routing.probs_TE.shape[-1]

    def run(
        x_TD: Tensor, ids_TK: Tensor, scores_TK: Tensor, gate_up: Tensor, down: Tensor
    ) -> tuple[Tensor]:
        way = dispatch(x_TD.to(gate_up.dtype), ids_TK, total, axes, comm)
        rows_RD = expert_ffn(gate_up, down, way.rows_RD, way.counts_e)
        return (combine(rows_RD, scores_TK, way, axes, comm, x_TD.dtype),)

    # Where the rows go decides shapes, which lanes of a vmap cannot differ in.
    call = closed(run, lanes="loop") if is_mapped(routing.ids_TK) else run
    return call(x_TD, routing.ids_TK, routing.scores_TK, experts["gate_up"], experts["down"])[0]
