"""Evaluation: a loss over all batches of all ranks, summed and divided once, as a step would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sharding import Comm, Plan
from sharding.tree import flatten, unflatten

from .agreement import check_agreement, structure_of
from .differentiate import Aux, Loss, checked, sum_over_ranks
from .state import State

Evaluate = Callable[[Any, Iterable[Any]], dict[str, Tensor]]


def make_evaluate(loss: Loss, plan: Plan, comm: Comm) -> Evaluate:
    """``evaluate(params, batches) -> metrics``: sums over batches and ranks, divided once.

    The mean does not depend on how the examples are split into batches and over ranks. Ranks need
    not have equally many batches: one that has come to its end goes on with no rows of its last,
    ``x[:0]`` of every tensor that has dims, until all have. Nothing is differentiated or kept, but
    under a transform, where the metrics are functions of params and batches.

    Args:
        loss: as of :func:`functional_ep.make_train_step`.
        plan: of the params.
        comm: the ranks; all make the same calls.

    Returns:
        The function. ``params`` are shards, such as ``state.params``; batches may be any iterable,
        of which one is read at a time. Its metrics are ``loss`` (NaN if nothing was counted),
        ``count``, and the sums of aux, all added up in float64 or int64.

    Raises:
        ValueError: from the function, on every rank: a rank without a batch, batches whose
            structure differs between ranks; on its own: a single batch, a state, a loss that
            returns no sum and count.

    >>> from sharding import Mesh, make_plan, sharded, simulate, zero3
    >>> params = {"w": torch.ones(2)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> def program(comm, batches):
    ...     def loss(view, x):
    ...         return (view["w"].sum() * x).sum(), x.numel()
    ...     evaluate = make_evaluate(sharded(loss, plan, comm), plan, comm)
    ...     return evaluate(plan.shard(params, comm), batches)
    >>> batches = [torch.ones(1), torch.zeros(2)], [torch.zeros(1)]
    >>> simulate(program, plan.mesh, batches)[1]
    {'loss': tensor(0.5000, dtype=torch.float64), 'count': tensor(4)}
    """
    plan.check_mesh(comm)

    def evaluate(params: Any, batches: Iterable[Any]) -> dict[str, Tensor]:
        if isinstance(params, State):
            raise ValueError("evaluate(params, batches): a State found, give its params")
        if isinstance(batches, Mapping | Tensor):
            raise ValueError("evaluate(params, batches): one batch found, give it in a list")
        shards = plan.unflatten(plan.check_shards(params, comm))
        sums: Aux = {}
        transformed = torch._C._are_functorch_transforms_active()
        with comm.letting_go(), nullcontext() if transformed else torch.no_grad():
            for batch in _until_all_end(batches, comm):
                total, count, aux = checked(loss(shards, batch))
                sums = _add(sums, {"loss": total, "count": count, **aux})
            names, found = list(sums), list(sums.values())
            metrics = dict(zip(names, sum_over_ranks(found, comm), strict=True))
            return metrics | {"loss": metrics["loss"] / metrics["count"]}

    return evaluate


def _until_all_end(batches: Iterable[Any], comm: Comm) -> Iterator[Any]:
    """The batches of this rank, then empty ones as long as another rank still has some."""
    mine, empty, none = iter(batches), None, object()
    while True:
        batch = next(mine, none)
        ended = batch is none
        counts = torch.tensor([int(ended), int(ended and empty is None)], device=comm.device)
        (counts,) = comm.all_reduce([counts], comm.mesh.axes)
        all_ended, without = int(counts[0]) == comm.mesh.size, int(counts[1])
        if without:
            raise ValueError(
                f"evaluate(params, batches): {without} of {comm.mesh.size} ranks have no batch at "
                "all; a rank without examples gives one that is empty"
            )
        if all_ended:
            return
        batch = empty if ended else batch
        check_agreement(structure_of((batch,)), "batch", comm)
        empty = _without_rows(batch)
        yield batch


def _without_rows(batch: Any) -> Any:
    leaves, spec = flatten(batch)
    return unflatten(spec, [x[:0] if isinstance(x, Tensor) and x.dim() else x for x in leaves])


def _add(sums: Aux, more: Aux) -> Aux:
    more = {name: _widest(x) for name, x in more.items()}
    if sums and sums.keys() != more.keys():
        raise ValueError(
            f"the loss's aux has {sorted(sums)} for one batch and {sorted(more)} for another: "
            "return the same names each time"
        )
    return {name: sums[name] + x for name, x in more.items()} if sums else more


def _widest(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
