"""sharded(): a function of views becomes a function of shards. The one combinator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .comm import Comm
from .plan import Plan
from .walk import Backward, Unit, Walk


def sharded(
    f: Callable[..., Any] | Sequence[Callable[..., Any]],
    plan: Plan,
    comm: Comm,
    backward: Backward = "regather",
) -> Callable[..., Any]:
    """``sharded(f)(shards, *args) = f(gather(shards), *args)``; the backward pass reduces.

    ``f(view, *args)`` computes on whole tensors. A *sequence* of functions runs left to right,
    ``x = f[i](view[i], x, *rest)``, with a sequence of shards: the gather of the next block runs
    ahead of this block's compute, in both directions, and reductions finish behind it. Around the
    whole loss this is simple; around each block it is ZeRO-3. The numbers are the same to the bit.

    Args:
        f: a function of a tree of views, or a list of such functions for a list of subtrees.
        plan: for the tree of shards, such as ``plan["blocks"][0]``, or for the list of them.
        comm: the ranks; all must make the same calls, and f may not return early on a rank that
            has no data: whether a view is gathered again depends on whether f used it.
        backward: what happens to a gathered view between forward and backward. It never changes a
            bit of the result. ``"keep"``: it stays; fastest, most memory. ``"regather"``: freed
            and gathered again (the last of a sequence stays: the backward pass begins with it);
            activations stay. ``"recompute"``: activations go too; f runs again, with the same
            numbers from torch's default generators, and must not depend on anything else that
            changes; where several blocks each use one of ``rest`` more than once, what they add to
            its gradient is added in another order. Under transforms inside of transforms views
            stay.

    Raises:
        ValueError: shards that do not fit the plan; under ``recompute`` a tensor that f captures
            instead of taking it as an argument, as far as it can be seen
            (:func:`sharding.captured.captured`), or a generator from outside of f.
        RuntimeError: from torch, for a transform of ``torch.func`` inside of f, unless views are
            kept; around what ``sharded`` returns they are in order.

    >>> import torch
    >>> from sharding import Mesh, make_plan, simulate, zero3
    >>> mesh, params = Mesh(edp=2), {"w": torch.ones(3)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, mesh)
    >>> def program(comm, x):
    ...     loss = sharded(lambda view, x: (view["w"] * x).sum(), plan, comm)
    ...     return torch.func.grad(loss)(plan.shard(params, comm), x)["w"]
    >>> simulate(program, mesh, [torch.tensor(1.0), torch.tensor(2.0)])
    [tensor([3., 3.]), tensor([3., 0.])]
    """
    if callable(f):
        only = [Unit(plan, comm, backward)]
        return lambda shards, *args: _chain(only, [f], [shards], args)
    functions = list(f)
    if not functions or len(plan.tree) != len(functions):
        raise ValueError(f"{len(functions)} functions for a plan of {len(plan.tree)} subtrees")
    units = [Unit(plan[i], comm, backward) for i in range(len(functions))]
    return lambda shards, *args: _chain(units, functions, shards, args)


def _chain(
    units: Sequence[Unit],
    functions: Sequence[Callable[..., Any]],
    shards: Sequence[Any],
    args: tuple[Any, ...],
) -> Any:
    if len(shards) != len(units):
        raise ValueError(f"{len(units)} units, but shards for {len(shards)}")
    pairs = zip(units, shards, strict=True)
    leaves = [unit.plan.check_shards(each, unit.comm) for unit, each in pairs]
    with Walk(units, leaves) as walk:
        for i, f in enumerate(functions):
            args = (walk.visit(i, f, *args), *args[1:])
    return args[0]
