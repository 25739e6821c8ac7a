"""Sums and their gradients: what a rank's tokens contribute, before anything is divided."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sharding import Comm, Plan
from sharding.collectives import Collective, apply
from sharding.comm import Op
from sharding.node import accept
from sharding.tree import flatten

from .factored import FACTORS, Factored
from .wide import wide

RESERVED = ("loss", "count", "grad_norm", "lr", "committed", "veto")

Loss = Callable[[Any, Any], tuple[Any, ...]]
Aux = dict[str, Tensor]
Sums = tuple[list[Tensor], Tensor, Tensor, Aux]


def accumulate(
    loss: Loss,
    plan: Plan,
    shards: list[Tensor],
    batches: Sequence[Any],
    factored: Collection[int] = (),
) -> Sums:
    """``(gradient, sum, count, aux)`` added over microbatches; gradients of leaves not frozen.

    The gradients belong to the caller: none shares memory with a parameter, a batch or another.
    Those of the ``factored`` leaves of the plan may be :class:`Factored`, for a single batch.
    """
    if len(batches) > 1:
        factored = ()  # sums are not products
    grads, total, count, aux = _sums(loss, plan, shards, batches[0], factored)
    for batch in batches[1:]:
        more, more_total, more_count, more_aux = _sums(loss, plan, shards, batch, factored)
        grads = [g + h for g, h in zip(grads, more, strict=True)]
        total, count = total + more_total, count + more_count
        if sorted(aux) != sorted(more_aux):
            raise ValueError(
                f"the loss's aux has {sorted(aux)} for one microbatch and {sorted(more_aux)} for "
                "another: return the same names each time"
            )
        aux = {name: aux[name] + more_aux[name] for name in aux}
    if not torch._C._are_functorch_transforms_active():
        grads = _own(grads, [*shards, *flatten(batches)[0]])
    return grads, total, count, aux


def sum_over_ranks(xs: Sequence[Tensor], comm: Comm, of: str = "") -> list[Tensor]:
    """``sum over all ranks`` of each tensor, in one message; differentiable.

    The sums are tensors of their own: what a loss returns may be a parameter. ``of`` says what is
    summed, which is to be the same on all ranks.
    """
    if comm.mesh.size == 1:
        return [x.clone() for x in xs]
    return list(apply(Collective(Op("all_reduce", comm.mesh.axes, of=of)), xs, comm))


def _sums(
    loss: Loss, plan: Plan, shards: list[Tensor], batch: Any, factored: Collection[int]
) -> Sums:
    """By plain autograd where no transform is active: it costs less Python, and the same bits."""

    trained = plan.trained_positions

    def total_and_rest(*leaves: Tensor) -> tuple[Tensor, tuple[Tensor, Aux]]:
        every = list(shards)
        for i, x in zip(trained, leaves, strict=True):
            every[i] = x
        total, count, aux = checked(loss(plan.unflatten(every), batch))
        return total, (count, aux)

    wanted = [shards[i] for i in trained]
    if torch._C._are_functorch_transforms_active():
        total, pull, *rest = torch.func.vjp(total_and_rest, *wanted, has_aux=True)
        ((count, aux),) = rest
        return list(pull(torch.ones_like(total))), total, count, aux
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in wanted]
        edges = [accept(x, FACTORS) for i, x in zip(trained, leaves, strict=True) if i in factored]
        total, (count, aux) = total_and_rest(*leaves)
    if not total.requires_grad:
        raise ValueError(
            "the loss does not depend on the shards it was given: gather them inside it, with "
            "sharded(f, plan, comm)(shards, ...), and compute on the view"
        )
    grads = list(torch.autograd.grad(total, leaves, materialize_grads=True))
    del edges
    return grads, total.detach(), count, {name: x.detach() for name, x in aux.items()}


def checked(result: Any) -> tuple[Tensor, Tensor, Aux]:
    """A loss's result, its aux in one order on all ranks, or an error that says what is wrong."""
    right = (
        "a loss returns (sum, count) or (sum, count, aux) over this rank's tokens, and the step "
        "divides by the count of all ranks; wrong: return cross_entropy(..., reduction='mean'); "
        "right: return cross_entropy(..., reduction='sum'), targets.numel()"
    )
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        kind = "a single tensor" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise ValueError(f"the loss returned {kind}: {right}")
    total, count, *rest = result
    if not isinstance(total, Tensor) or total.dim() or not total.is_floating_point():
        raise ValueError(f"the loss's sum is {_show(total)}, not a floating-point scalar: {right}")
    if isinstance(count, int):
        count = torch.tensor(count, device=total.device)
    if not isinstance(count, Tensor) or count.dim() or count.is_complex():
        raise ValueError(f"the loss's count is {_show(count)}, not a real scalar: {right}")
    if count.requires_grad:
        raise ValueError(f"the loss's count depends on the parameters: {right}")
    aux = rest[0] if rest else {}
    if not isinstance(aux, dict) or not all(isinstance(x, Tensor) for x in aux.values()):
        raise ValueError(f"the loss's aux is {_show(aux)}, not a dict of tensors: {right}")
    taken = [name for name in aux if name in RESERVED or name.startswith("lr/")]
    if taken:
        raise ValueError(
            f"the loss's aux has {taken[0]!r}, which is a metric of the step: rename it"
        )
    sums = {name: _summable(aux[name]) for name in sorted(aux)}  # one order on all ranks
    return _summable(total), _summable(count), sums


def _summable(x: Tensor) -> Tensor:
    """In a dtype whose sums are right: of a bool there is none, and a uint8 ends at 255."""
    if x.is_floating_point() or x.is_complex():
        return wide(x)
    return x.long()


def _show(x: Any) -> str:
    return f"a tensor {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)


def _own(grads: list[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """Gradients in memory of their own: autograd may hand out an input, or one tensor twice."""
    taken = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor) and x.numel()}
    seen: set[int] = set()
    own: list[Tensor] = []
    for g in grads:
        if isinstance(g, Factored):
            own.append(g)
            continue
        shared = g.untyped_storage().data_ptr() in taken or g.data_ptr() in seen
        own.append(g.clone() if shared and g.numel() else g.contiguous())
        seen.add(own[-1].data_ptr())
    return own
