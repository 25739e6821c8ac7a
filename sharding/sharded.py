"""sharded(): a function of views becomes a function of shards. The one combinator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .closed import closed
from .collectives import start, wait
from .comm import Comm
from .fetched import Fetched, can_release, release_after_backward
from .gather import Gather
from .plan import Plan
from .tree import flatten, unflatten

Backward = Literal["keep", "regather", "recompute"]


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
            and gathered again; activations stay. ``"recompute"``: activations go too; f runs again,
            with the same random numbers. Under transforms inside of transforms views stay.

    Raises:
        ValueError: shards that do not fit the plan; under ``recompute`` a tensor that f captures
            instead of taking it as an argument.

    >>> from sharding import Mesh, make_plan, simulate, zero3
    >>> mesh, params = Mesh(edp=2), {"w": torch.ones(3)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, mesh)
    >>> def program(comm, x):
    ...     loss = sharded(lambda view, x: (view["w"] * x).sum(), plan, comm)
    ...     return torch.func.grad(loss)(plan.shard(params, comm), x)["w"]
    >>> simulate(program, mesh, [torch.tensor(1.0), torch.tensor(2.0)])
    [tensor([3., 3.]), tensor([3., 0.])]
    """
    if backward not in get_args(Backward):
        raise ValueError(f"backward={backward!r}: choose one of {get_args(Backward)}")
    plan.check_mesh(comm)
    if callable(f):
        only = _Unit(f, plan, comm, backward)
        return lambda shards, *args: _chain([only], [shards], args)
    units = [_Unit(g, plan[i], comm, backward) for i, g in enumerate(f)]
    if not units or len(plan.tree) != len(units):
        raise ValueError(f"{len(units)} functions for a plan of {len(plan.tree)} subtrees")
    return lambda shards, *args: _chain(units, shards, args)


class _Unit:
    """One function, and the gather of the leaves that it computes on."""

    def __init__(self, f: Callable[..., Any], plan: Plan, comm: Comm, backward: Backward) -> None:
        self.f, self.plan, self.comm, self.backward = f, plan, comm, backward
        self.travelling = [i for i, w in enumerate(plan.layouts) if not w.is_local]
        self.gather = Gather(tuple(plan.layouts[i] for i in self.travelling))

    def fetch(self, shards: Any) -> tuple[list[Tensor], Tensor | None]:
        """Check the shards and start gathering them."""
        leaves = self.plan.check_shards(shards, self.comm)
        if not self.travelling:
            return leaves, None
        return leaves, start(self.gather, [leaves[i] for i in self.travelling], self.comm)

    def run(
        self,
        leaves: list[Tensor],
        ticket: Tensor | None,
        ahead: Callable[[], Any],
        args: tuple[Any, ...],
        previous: Fetched | None,
    ) -> tuple[Any, Fetched | None, Any]:
        """Await the views, set the next gather going (``ahead``), compute."""
        views = [x.view(w.view_shape) if w.is_local else x for x, w in self._with_layouts(leaves)]
        saving, fetched = nullcontext(), previous
        if ticket is not None:
            gathered = wait(self.gather, ticket, self.comm)
            sources = [leaves[i] for i in self.travelling]
            if self.backward != "keep" and torch.is_grad_enabled() and can_release(sources):
                fetched = Fetched(self.gather, sources, self.comm, gathered, previous)
                gathered = release_after_backward(fetched, gathered)
                saving = fetched.saving()
            for i, view in zip(self.travelling, gathered, strict=True):
                views[i] = view
            del gathered
        next_ticket = ahead()
        with saving:
            return self.compute(views, args), fetched, next_ticket

    def compute(self, views: list[Tensor], args: tuple[Any, ...]) -> Any:
        if self.backward == "recompute":
            return _recomputed(self.f, self.plan.unflatten(list(views)), args)
        return self.f(self.plan.unflatten(views), *args)

    def _with_layouts(self, leaves: list[Tensor]) -> Iterator[tuple[Tensor, Any]]:
        return zip(leaves, self.plan.layouts, strict=True)


def _chain(units: Sequence[_Unit], shards: Sequence[Any], args: tuple[Any, ...]) -> Any:
    if len(shards) != len(units):
        raise ValueError(f"{len(units)} functions, but shards for {len(shards)}")
    fetched: Fetched | None = None
    pending = units[0].fetch(shards[0])
    for i, unit in enumerate(units):

        def ahead(i: int = i) -> Any:
            return units[i + 1].fetch(shards[i + 1]) if i + 1 < len(units) else None

        leaves, ticket = pending
        x, fetched, pending = unit.run(leaves, ticket, ahead, args, fetched)
        args = (x, *args[1:])
    return args[0]


def _recomputed(f: Callable[..., Any], view: Any, args: tuple[Any, ...]) -> Any:
    """``f(view, *args)`` as one node that keeps only its inputs."""
    leaves, spec = flatten((view, args))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    static = [None if isinstance(x, Tensor) else x for x in leaves]
    out: list[Any] = []  # structure and static leaves of the result, the same at every call

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        every = list(static)
        for i, x in zip(places, tensors, strict=True):
            every[i] = x
        view, args = unflatten(spec, every)
        results, result_spec = flatten(f(view, *args))
        out[:] = [result_spec, [None if isinstance(y, Tensor) else y for y in results]]
        return tuple(y for y in results if isinstance(y, Tensor))

    flat.__name__ = getattr(f, "__name__", "f")
    tensors = iter(closed(flat)(*(leaves[i] for i in places)))
    result_spec, others = out
    return unflatten(result_spec, [next(tensors) if y is None else y for y in others])
