"""Memory of a train step, found out by rehearsing it: nothing is computed, sent or allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from sharding import Comm, Plan
from sharding.rehearsal import Memory, rehearse

from .differentiate import Loss
from .optim import Optimizer
from .state import init_state
from .train_step import make_train_step

Optimizers = Optimizer | Mapping[str, Optimizer]


class StepMemory(NamedTuple):
    """Bytes of tensors on one rank: the state, and the most that a step has alive beside it.

    ``moments`` is the optimizers' state and the clock.
    ``step`` is activations, views, gradients and all that is temporary, when most is alive.

    >>> print(StepMemory(params=2**20, moments=2**21, step=2**19))
    params 1.0 MiB, moments 2.0 MiB, step 0.5 MiB: 3.5 MiB
    """

    params: int
    moments: int
    step: int

    @property
    def peak(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = [f"{name} {n / 2**20:.1f} MiB" for name, n in self._asdict().items()]
        return f"{', '.join(parts)}: {self.peak / 2**20:.1f} MiB"


def step_memory(
    loss: Callable[[Plan, Comm], Loss],
    plan: Plan,
    optimizers: Optimizers | Callable[[Plan, Comm], Optimizers],
    batch: Any,
    *,
    clip: float | None = None,
    donate: bool = True,
    rank: int = 0,
) -> StepMemory:
    """The most bytes alive on a rank in ``make_train_step(loss(plan, comm), ...)``, beforehand.

    The real step runs, on tensors whose memory is never touched: on one process, in seconds, for a
    mesh of any size. Routers choose evenly. Not counted are memory that an operator needs inside,
    what torch and its libraries take, what a transport keeps, and what malloc wastes.

    Args:
        loss: makes the loss, such as ``lambda plan, comm: lm.loss(cfg, plan, comm, "keep")``.
        plan: of the params.
        optimizers: as for the step; of those that communicate, what makes them, as for the loss.
        batch: of this rank; integers in it are read.
        clip: as for the step.
        donate: as for the step, but true unless said otherwise.
        rank: whose memory.

    Raises:
        TypeError: ``loss`` makes none of a plan and a comm: it may be one itself.

    >>> from functional_ep import adamw, lm
    >>> from sharding import Mesh, expert_parallel, make_plan, zero3
    >>> cfg = lm.Config(dim=64, layers=2, ffn=64)
    >>> rules = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
    >>> plan = make_plan(lm.init(cfg), lm.labels, rules, Mesh(edp=4, ep=8))
    >>> ids = torch.zeros(4, 128, dtype=torch.int64)
    >>> def peak(backward):
    ...     loss = lambda plan, comm: lm.loss(cfg, plan, comm, backward)
    ...     batch = {"input_ids": ids, "labels": ids}
    ...     return step_memory(loss, plan, adamw(1e-3), batch, clip=1.0).peak
    >>> peak("keep") > peak("regather") > peak("recompute")
    True
    """

    def program(comm: Comm, memory: Memory) -> StepMemory:
        shards = [torch.empty(w.shard_size, dtype=w.dtype) for w in plan.layouts]
        params = memory.alive
        own = optimizers(plan, comm) if callable(optimizers) else optimizers
        state = init_state(plan.unflatten(shards), plan, own)
        del shards
        moments = memory.alive - params
        step = make_train_step(_made(loss, plan, comm), plan, own, comm, clip=clip, donate=donate)
        memory.restart()
        for _ in range(2):  # the first leaves buffers behind for the second
            state, _ = step(state, batch)
        return StepMemory(params, moments, memory.most - params - moments)

    return rehearse(program, plan.mesh, rank)


def _made(loss: Callable[[Plan, Comm], Loss], plan: Plan, comm: Comm) -> Loss:
    """The loss, or an error that says that it was to be made here."""
    needed = (
        "step_memory makes the loss itself, for ranks that are not there: pass what makes it, such "
        "as lambda plan, comm: lm.loss(cfg, plan, comm)"
    )
    try:
        made = loss(plan, comm)
    except Exception as error:  # a loss takes the two for shards and a batch, and may say anything
        raise TypeError(f"{needed}. {loss!r} of a plan and a comm raises: {error}") from error
    if not callable(made):
        raise TypeError(f"{needed}. {loss!r} of a plan and a comm is {made!r}")
    return made
