"""The train step: sum everything, divide once, clip by the one global norm, step each label.

In four lines::

    grads, (total, count) = sums over this rank's tokens; gather and reduce happen inside the loss
    grads = grads / psum(count)                               every label alike
    grads = grads * min(1, clip / (norm + 1e-6))              one norm, copies counted once
    params, opt = update each label with its optimizer        one clock
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from sharding import Comm, Plan
from sharding.order import Order

from .agreement import check_agreement, structure_of
from .differentiate import Loss, accumulate, sum_over_ranks
from .norm import global_norm
from .optim import Optimizer
from .poll import Poll
from .state import State
from .step_by_label import StepByLabel
from .vote import Vetoed, Vote, as_vote

Metrics = dict[str, Tensor]
Step = Callable[..., tuple[State, Metrics]]


def make_train_step(
    loss: Loss,
    plan: Plan,
    optimizers: Optimizer | Mapping[str, Optimizer],
    comm: Comm,
    *,
    clip: float | None = None,
    donate: bool = False,
    commit: Literal["vote"] | Vote | None = None,
) -> Step:
    """``step(state, batch) -> (state', metrics)``: the same numbers on every mesh.

    ``step(state, micro1, micro2, ...)`` accumulates: sums of sums, divided once, so any split of a
    batch gives the same gradient. (Statistics that a loss takes over a batch, such as the balance
    of experts, are those of a microbatch.) The step is pure, and transforms may wrap it: what it
    gives has the derivatives of one process. A hyperparameter to differentiate by, one value on all
    ranks, has to meet shards as ``sgd(lambda step: pvary(rate, rule.axes, comm))``.

    Args:
        loss: ``loss(shards, batch) -> (sum, count)`` or ``(sum, count, aux)``, local to the rank:
            the sum of the losses of its tokens, how many they are (or the sum of their weights),
            and a dict of tensors to be summed over microbatches and ranks for the metrics.
        plan: of the params.
        optimizers: one for all labels, or one for each.
        comm: the ranks; all take part in every step, also one whose batch is empty.
        clip: the largest global norm of the gradient; longer ones are scaled down to it.
        donate: write the new state into the memory of the old one, which must not be used again;
            frozen leaves stay where they are, and no others may share memory.
        commit: ``"vote"`` or a :class:`Vote`: take the step on all ranks or, for what they find
            wrong with it, on none. It costs no message. By default the step is always taken.

    Returns:
        The step. Its metrics are tensors: ``loss`` (the global mean), ``count``, ``grad_norm``
        (before clipping), ``lr`` (``lr/LABEL`` with several optimizers), the sums of aux, and
        with a vote ``committed`` and ``veto``, which :func:`why` reads.

    Raises:
        ValueError: from the step, for a state that was donated or that other optimizers have begun,
            a loss that returns no sum and count, or batches whose structure differs between ranks.
        Vetoed: from the step of a vote that raises, on every rank.

    >>> from sharding import Mesh, make_plan, simulate, zero3, sharded
    >>> from functional_ep import init_state, sgd
    >>> params = {"w": torch.zeros(2)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> def program(comm, x):
    ...     def loss(view, x):
    ...         return ((view["w"].sum() - x) ** 2).sum(), x.numel()
    ...     step = make_train_step(sharded(loss, plan, comm), plan, sgd(0.1), comm)
    ...     return step(init_state(plan.shard(params, comm), plan, sgd(0.1)), x)
    >>> state, metrics = simulate(program, plan.mesh, [torch.ones(3), torch.ones(0)])[0]
    >>> metrics["loss"], metrics["grad_norm"]
    (tensor(1.), tensor(2.8284, dtype=torch.float64))
    """
    plan.check_mesh(comm)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: the largest norm is positive; None does not clip")
    if not plan.trained:
        raise ValueError(f"all labels are frozen, {sorted(plan.frozen)}: there is nothing to train")
    update = StepByLabel(plan, optimizers, comm, clip, donate)
    vote = as_vote(commit)
    poll = Poll(plan, comm, vote) if vote else None

    def step(state: State, *batches: Any) -> tuple[State, Metrics]:
        _check(state, batches, donate, poll is not None)
        update.check(state)
        comm.at(state.step)
        order = Order(comm.mesh) if poll else None
        with comm.letting_go(), comm.heard_by(order) if order else nullcontext():
            check_agreement(structure_of(batches), "batch", comm)
            shards = plan.check_shards(state.params, comm)
            grads, mine, count, aux = accumulate(loss, plan, shards, batches, update.factored)
            names = ", ".join(["loss", "count", *aux])
            total, count, *sums = sum_over_ranks([mine, count, *aux.values()], comm, names)
        per_token = 1 / torch.where(count > 0, count, 1).double()
        if poll and order:
            norm, verdict = poll.take(state, batches, mine, grads, order)
        else:
            norm, verdict = global_norm(grads, update.copies, comm), {}
        norm = norm * per_token
        metrics = {"loss": total * per_token.to(total.dtype), "count": count, "grad_norm": norm}
        metrics |= update.rates(state.step) | dict(zip(aux, sums, strict=True)) | verdict
        if vote and not verdict["committed"]:
            if vote.on_veto == "raise":
                raise Vetoed(metrics)
            return update.skip(state), metrics
        return update(state, shards, grads, per_token, norm), metrics

    return _unrecorded(step)


def _unrecorded(step: Step) -> Step:
    """Without transforms, a state does not hold on to how it was made from the one before."""

    def called(state: State, *batches: Any) -> tuple[State, Metrics]:
        if torch._C._are_functorch_transforms_active():
            return step(state, *batches)
        with torch.no_grad():
            return step(state, *batches)

    return called


def _check(state: Any, batches: tuple[Any, ...], donate: bool, votes: bool) -> None:
    if not isinstance(state, State):
        raise ValueError(f"step(state, batch): a State expected, found {type(state).__name__}")
    if not batches:
        raise ValueError("step(state, batch): no batch; a rank without tokens gives an empty one")
    if int(state.step.shape.numel()) == 0:
        raise ValueError(
            "this state was donated to an earlier step, which wrote the next state into its "
            "memory: use the state that the step returned, or make_train_step(..., donate=False)"
        )
    if (donate or votes) and torch._C._are_functorch_transforms_active():
        raise ValueError(
            "donate=True under a transform: a transform needs its inputs later"
            if donate
            else "commit under a transform: whether a step is taken has no derivative"
        )
