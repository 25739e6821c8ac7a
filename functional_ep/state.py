"""The train state: one pytree, everything that a step reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding import Plan

from .optim import Moments, Optimizer, by_label


class State(NamedTuple):
    """Step, parameters and optimizer state; only tensors, in plain containers.

    ``step`` counts finished steps, an int64 scalar on CPU: the one clock of every schedule.
    ``params`` holds this rank's shards in the shape of the params, the fp32 masters if the plan's
    precision computes in less. ``opt[label][moment][path]`` is a shard like the parameter's.

    >>> state = State(torch.tensor(0), {"w": torch.ones(2)}, {})
    >>> state._replace(step=state.step + 1).step
    tensor(1)
    """

    step: Tensor
    params: Any
    opt: dict[str, Moments]


def init_state(shards: Any, plan: Plan, optimizers: Optimizer | Mapping[str, Optimizer]) -> State:
    """The state at step 0: these shards, and whatever each label's optimizer starts from.

    Args:
        shards: from ``plan.shard(params, comm)``; the state holds them, it does not copy.
        plan: what they are shards of.
        optimizers: one for all labels, or one for each.

    Raises:
        ValueError: labels without optimizer, or optimizers without label; both sets are named.

    >>> from sharding import Mesh, make_plan, simulate, zero3
    >>> from functional_ep import adamw
    >>> params = {"w": torch.ones(3)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> start = lambda comm: init_state(plan.shard(params, comm), plan, adamw(1e-3))
    >>> simulate(start, plan.mesh)[0].opt["dense"]["m"]
    {'w': tensor([0., 0.])}
    """
    leaves = plan.flatten(shards, "shards")
    opt: dict[str, Moments] = {}
    for label, optimizer in by_label(optimizers, plan).items():
        mine = {
            leaf.path: x for leaf, x in zip(plan.leaves, leaves, strict=True) if leaf.label == label
        }
        opt[label] = optimizer.init(mine)
    return State(torch.zeros((), dtype=torch.int64), shards, opt)
