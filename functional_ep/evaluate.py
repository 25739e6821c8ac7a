"""Evaluation: a loss over all batches of all ranks, summed and divided once, as a step would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding import Comm, Plan
from sharding.tree import flatten, path_strings, show, unflatten

from .agreement import check_agreement, common_failure, structure_of, together
from .differentiate import Aux, Loss, checked, sum_over_ranks
from .state import State

Evaluate = Callable[[Any, Iterable[Any]], dict[str, Tensor]]


def make_evaluate(loss: Loss, plan: Plan, comm: Comm) -> Evaluate:
    """``evaluate(params, batches) -> metrics``: sums over batches and ranks, divided once.

    Where a loss is a sum over rows, the mean does not depend on how they are split into batches and
    over ranks. (What is a statistic of a batch does, such as the balance of experts, which is part
    of the loss of ``lm`` and of models that ask for it: cross-entropy alone is ``nll / count``.)
    Ranks need not have equally many batches: one that has come to its end goes on with no rows of
    its last, ``x[:0]`` of every tensor that has dims, until all have, and that counts for nothing.
    Nothing is differentiated or kept, but under a transform, where the metrics are functions of
    params and batches.

    Args:
        loss: as of :func:`functional_ep.make_train_step`; without dropout, which a converted model
            leaves out by ``model.loss(plan, comm, training=False)``.
        plan: of the params.
        comm: the ranks; all make the same calls.

    Returns:
        The function. ``params`` are shards, such as ``state.params``; batches may be any iterable,
        of which one is read at a time. Its metrics are ``loss`` (NaN if nothing was counted),
        ``count``, and the sums of aux, all added up in float64 or int64.

    Raises:
        ValueError: from the function, on every rank: a state, a single batch, no batch at all, one
            that has no rows to leave out; batches or aux that differ between ranks in structure.
        Exception: whatever fails on one rank as it reads its batches is raised on all.

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
        shards, mine = together(lambda: _opened(params, batches, plan, comm), comm)
        sums: Aux = {}
        transformed = torch._C._are_functorch_transforms_active()
        with comm.letting_go(), nullcontext() if transformed else torch.no_grad():
            for batch, counts in _until_all_end(mine, comm):
                total, count, aux = checked(loss(shards, batch))
                more = {"loss": total, "count": count, **aux}
                sums = _add(sums, {name: _widest(x, counts) for name, x in more.items()})
            check_agreement("\n".join(sums), "loss's aux", comm)
            found = sum_over_ranks(list(sums.values()), comm)
        metrics = dict(zip(sums, found, strict=True))
        return metrics | {"loss": metrics["loss"] / metrics["count"]}

    return evaluate


def _opened(
    params: Any, batches: Iterable[Any], plan: Plan, comm: Comm
) -> tuple[Any, Iterator[Any]]:
    if isinstance(params, State):
        raise ValueError("evaluate(params, batches): a State found, give its params")
    if isinstance(batches, Mapping | Tensor):
        raise ValueError("evaluate(params, batches): one batch found, give it in a list")
    return plan.unflatten(plan.check_shards(params, comm)), iter(batches)


class _Round(NamedTuple):
    """What a rank has for one call of the loss: a batch that counts, or one without rows.

    ``problem`` is why there is no such batch, which matters if others still have some.
    """

    batch: Any
    structure: str
    counts: bool = True
    problem: Exception | None = None


def _until_all_end(mine: Iterator[Any], comm: Comm) -> Iterator[tuple[Any, bool]]:
    """The batches of this rank, then empty ones as long as another rank still has some."""
    now: _Round | None = None
    while True:
        failure: Exception | None = None
        try:
            now = _next(mine, now)
        except Exception as error:
            failure = error
        problem = failure or (now.problem if now else None)
        mine_are = (now is not None and now.counts, failure is not None, problem is not None)
        flags = torch.tensor([*map(int, mine_are)], device=comm.device)
        going, failed, hindered = comm.all_reduce([flags], comm.mesh.axes)[0].tolist()
        if failed or (going and hindered):
            common = common_failure(problem, comm)
            assert common is not None
            raise common from (None if common is problem else problem)
        if not going or now is None:
            return
        check_agreement(now.structure, "batch", comm)
        yield now.batch, now.counts


def _next(mine: Iterator[Any], last: _Round | None) -> _Round:
    for batch in mine:
        return _Round(batch, structure_of((batch,)))
    if last is None:
        raise ValueError(
            "evaluate(params, batches): no batch at all; a rank without examples gives an empty one"
        )
    if not last.counts:
        return last
    try:
        return last._replace(batch=_without_rows(last.batch), counts=False)
    except ValueError as error:
        return last._replace(counts=False, problem=error)


def _without_rows(batch: Any) -> Any:
    leaves, spec = flatten(batch)
    paths = path_strings(batch)
    return unflatten(spec, [_no_rows(x, path) for x, path in zip(leaves, paths, strict=True)])


def _no_rows(x: Any, path: str) -> Any:
    if isinstance(x, Tensor):
        return x[:0] if x.dim() else x
    if isinstance(x, Mapping):  # of a library's own, such as BatchEncoding
        return {key: _no_rows(value, f"{path}/{key}".strip("/")) for key, value in x.items()}
    if isinstance(x, str | Number | None):
        return x
    raise ValueError(
        f"{show(path, 'batch')} is a {type(x).__name__}, of which rows cannot be left out when a "
        "rank has no more batches: give tensors, or as many batches on every rank"
    )


def _add(sums: Aux, more: Aux) -> Aux:
    if sums and sums.keys() != more.keys():
        raise ValueError(
            f"the loss's aux has {sorted(sums)} for one batch and {sorted(more)} for another: "
            "return the same names each time"
        )
    return {name: sums[name] + x for name, x in more.items()} if sums else more


def _widest(x: Tensor, counts: bool) -> Tensor:
    """As it is added up; nothing of a batch without rows, whatever the loss makes of it."""
    x = x.double() if x.is_floating_point() else x
    return x if counts else torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x, 0)
