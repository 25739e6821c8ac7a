"""The train state: one pytree, everything that a step reads and writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding import Comm, Plan, reshard
from sharding.tree import show

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
            Shards that are none; moments that are not like them.

    >>> from sharding import Mesh, make_plan, simulate, zero3
    >>> from functional_ep import adamw
    >>> params = {"w": torch.ones(3)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> start = lambda comm: init_state(plan.shard(params, comm), plan, adamw(1e-3))
    >>> simulate(start, plan.mesh)[0].opt["dense"]["m"]
    {'w': tensor([0., 0.])}
    """
    leaves = plan.check_sizes(shards, "shards")
    opt: dict[str, Moments] = {}
    for label, optimizer in by_label(optimizers, plan).items():
        mine = {
            leaf.path: x for leaf, x in zip(plan.leaves, leaves, strict=True) if leaf.label == label
        }
        opt[label] = optimizer.init(mine)
        _check_moments(opt[label], label, mine)
    return State(torch.zeros((), dtype=torch.int64), shards, opt)


def check_moment_name(name: str, where: str) -> None:
    """Refuse a name by which two tensors, of a leaf or of two, would be one in a file."""
    if name == "params" or "/" in name:
        raise ValueError(
            f"{where}: a moment cannot be saved as 'params', as the parameter itself is, nor with "
            "a '/', as a path is: let the optimizer's init call it something else"
        )


def _check_moments(moments: Any, label: str, shards: Mapping[str, Tensor]) -> None:
    """Refuse moments that could be neither stored nor moved to another mesh."""
    where = f"optimizers[{label!r}].init"
    for name, by_path in moments.items():
        check_moment_name(name, where)
        if set(by_path) != set(shards):
            path = show(min(set(by_path) ^ set(shards)), name)
            raise ValueError(f"{where}: {path} is missing or left over: each leaf has one")
        for path, x in by_path.items():
            if x.shape != shards[path].shape:
                raise ValueError(
                    f"{where}: {show(path, name)} has the shape {tuple(x.shape)}, its parameter "
                    f"{tuple(shards[path].shape)}: moments are cut as parameters are, in entries"
                )


def reshard_state(state: State, from_plan: Plan, to_plan: Plan, comm: Comm) -> State:
    """The same state, on other rules, labels or axes: training goes on as if it had begun there.

    Moments move with their parameters, so labels may be cut differently; those of a label that is
    frozen now are left behind.

    Args:
        state: of ``from_plan``.
        from_plan: where it lives now.
        to_plan: where it is to live.
        comm: the ranks; see :func:`sharding.reshard`.

    Raises:
        ValueError: plans that do not fit, or a state that is not of ``from_plan`` or was donated; a
            label whose leaves have different moments, or none, because they had other optimizers or
            were frozen.

    >>> from sharding import Mesh, make_plan, replicated, simulate, zero3
    >>> from functional_ep import adamw
    >>> params, mesh = {"w": torch.ones(3)}, Mesh(edp=2)
    >>> rules = {"dense": zero3("edp")}, {"all": replicated()}
    >>> labels = {"w": "dense"}, {"w": "all"}
    >>> a, b = (make_plan(params, *each, mesh) for each in zip(labels, rules))
    >>> def program(comm):
    ...     state = init_state(a.shard(params, comm), a, adamw(1e-3))
    ...     return reshard_state(state, a, b, comm).opt["all"]["m"]["w"].shape
    >>> simulate(program, mesh)[0]
    torch.Size([3])
    """
    if state.step.numel() == 0:
        raise ValueError("this state was donated to a step: move the one that the step returned")
    olds, news = ({leaf.path: leaf for leaf in plan.leaves} for plan in (from_plan, to_plan))
    held: dict[str, dict[str, Tensor]] = {path: {} for path in olds}
    for moments in state.opt.values():
        for name, by_path in moments.items():
            for path, x in by_path.items():
                held[path][name] = x
    params = reshard(state.params, from_plan, to_plan, comm)
    frozen = {leaf.path for leaf in from_plan.leaves if leaf.label in from_plan.frozen}
    opt: dict[str, Moments] = {}
    for label in to_plan.trained:
        paths = [leaf.path for leaf in to_plan.leaves if leaf.label == label]
        old, new = from_plan.at([olds[p] for p in paths]), to_plan.at([news[p] for p in paths])
        opt[label] = {
            name: dict(
                zip(paths, reshard([held[p][name] for p in paths], old, new, comm), strict=True)
            )
            for name in moments_in_common(label, {path: held[path] for path in paths}, frozen)
        }
    return State(state.step.clone(), params, opt)


def moments_in_common(
    label: str, held: Mapping[str, Collection[str]], frozen: Collection[str]
) -> list[str]:
    """The names of the moments that all leaves of a label have, by whose paths they are given.

    Raises:
        ValueError: leaves with different moments, or one that was frozen.

    >>> moments_in_common("dense", {"a": ["m", "v"], "b": ["m", "v"]}, frozen=())
    ['m', 'v']
    """
    first = next(iter(held))
    for path, names in held.items():
        if path in frozen:
            raise ValueError(f"{path!r} was frozen and has no moments to go on with: start a state")
        if set(names) != set(held[first]):
            raise ValueError(
                f"label {label!r}: {first!r} has the moments {sorted(held[first])} and "
                f"{path!r} has {sorted(names)}; they had different optimizers"
            )
    return list(held[first])
