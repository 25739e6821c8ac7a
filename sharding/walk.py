"""A walk over units: each is gathered when it is visited, and the gather of the next runs ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .closed import closed
from .collectives import forget, start, wait
from .comm import Comm
from .fetched import Fetched, can_release, release_after_backward
from .gather import Gather
from .plan import Plan
from .tree import flatten, unflatten

Backward = Literal["keep", "regather", "recompute"]


NO_TRANSFORM_INSIDE = (
    "A transform of torch.func inside of a block cannot begin while autograd is told to keep notes "
    "instead of the gathered views: use backward='keep' for this part, or put the transform "
    "around sharded(...)"
)


class _Pending(NamedTuple):
    """A unit's shards, and their gathers under way (none, if nothing travels)."""

    leaves: list[Tensor]
    tickets: list[Tensor]


class Unit:
    """Leaves that are gathered together, for one part of a computation.

    Args:
        plan: of the part, such as ``plan["blocks"][0]``.
        comm: the ranks.
        backward: see :func:`sharding.sharded`.
    """

    def __init__(self, plan: Plan, comm: Comm, backward: Backward = "regather") -> None:
        if backward not in get_args(Backward):
            raise ValueError(f"backward={backward!r}: choose one of {get_args(Backward)}")
        plan.check_mesh(comm)
        self.plan, self.comm, self.backward = plan, comm, backward
        self.travelling = [i for i, w in enumerate(plan.layouts) if not w.is_local]
        # What does not travel is its own view, unless that has another shape than the shard.
        self.local = [
            (i, w.view_shape)
            for i, w in enumerate(plan.layouts)
            if w.is_local and w.view_shape != (w.shard_size,)
        ]
        self.frozen = [i for i, w in enumerate(plan.layouts) if w.frozen]
        self.gather = self._gather_of(self.travelling)
        # Apart from each other: what is differentiated, and what is a constant.
        trained = [i for i in self.travelling if i not in self.frozen]
        constant = [i for i in self.travelling if i in self.frozen]
        self.parts = [(part, self._gather_of(part)) for part in (trained, constant) if part]

    def _gather_of(self, positions: list[int]) -> Gather:
        first = self.plan.leaves[positions[0]].path if positions else ""
        return Gather(tuple(self.plan.layouts[i] for i in positions), first)

    def fetch(self, leaves: list[Tensor]) -> _Pending:
        """Start gathering shards that have been checked."""
        if self.frozen:
            leaves = [x.detach() if i in self.frozen else x for i, x in enumerate(leaves)]
        tickets = [
            start(gather, [leaves[i] for i in part], self.comm) for part, gather in self.parts
        ]
        return _Pending(leaves, tickets)

    def views(
        self, pending: _Pending, keep: bool, previous: Fetched | None, last: bool = False
    ) -> tuple[list[Tensor], Fetched | None]:
        """Await the views; unless they are kept, with the note by which they are fetched again."""
        leaves, tickets = pending
        views = list(leaves)
        for i, shape in self.local:
            views[i] = leaves[i].view(shape)
        for (part, gather), ticket in zip(self.parts, tickets, strict=True):
            for i, view in zip(part, wait(gather, ticket, self.comm), strict=True):
                views[i] = view
        sources = [leaves[i] for i in self.travelling]
        if keep or not sources or not torch.is_grad_enabled() or not can_release(sources):
            return views, None
        gathered = [views[i] for i in self.travelling]
        fetched = Fetched(self.gather, sources, self.comm, gathered, previous, last)
        # Constants do not say when the backward pass is done with them: theirs is the last note.
        if not self.frozen:
            gathered = release_after_backward(fetched, gathered)
            for i, view in zip(self.travelling, gathered, strict=True):
                views[i] = view
        return views, fetched

    def forget(self, pending: _Pending) -> None:
        """Give up a gather, whose result nobody will await."""
        for ticket in pending.tickets:
            forget(ticket, self.comm)

    def compute(self, f: Callable[..., Any], views: list[Tensor], args: tuple[Any, ...]) -> Any:
        if self.backward == "recompute":
            return _recomputed(f, self.plan.unflatten(list(views)), args)
        return f(self.plan.unflatten(views), *args)


class Walk:
    """``visit(i, f, *args) = f(gather(shards[i]), *args)``, unit by unit, in one forward pass.

    For computations whose order is somebody else's: units may be visited in any order, more than
    once or not at all, but by all ranks alike. Each visit starts the gather of the unit after it,
    if that has not been visited, and the backward pass that of the unit visited before it.
    :func:`sharding.sharded` of a list is the walk from the first to the last.

    Args:
        units: the parts, in the order in which they are likely to be visited.
        shards: for each of them its leaves, as ``plan.check_shards`` returns them.

    >>> from sharding import Mesh, make_plan, simulate, zero3
    >>> params = {"a": torch.ones(2), "b": torch.ones(2)}
    >>> labels = {"a": "dense", "b": "dense"}
    >>> plan = make_plan(params, labels, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> def program(comm):
    ...     units = [Unit(plan["a"], comm), Unit(plan["b"], comm)]
    ...     shards = plan.shard(params, comm)
    ...     with Walk(units, [[shards["a"]], [shards["b"]]]) as walk:
    ...         return walk.visit(1, lambda b, x: (b * x).sum(), 3.0)
    >>> simulate(program, plan.mesh)
    [tensor(6.), tensor(6.)]
    """

    def __init__(self, units: Sequence[Unit], shards: Sequence[list[Tensor]]) -> None:
        if len(shards) != len(units):
            raise ValueError(f"{len(units)} units, but shards for {len(shards)}")
        self.units, self.shards = units, shards
        self.pending: dict[int, _Pending] = {}
        self.visited: set[int] = set()
        self.previous: Fetched | None = None

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Await what was fetched ahead and then not visited; after a failure let it go."""
        left, self.pending = self.pending, {}
        for i, pending in left.items():
            if kind is None:
                self.units[i].views(pending, True, None)
            else:
                self.units[i].forget(pending)

    def visit(self, i: int, f: Callable[..., Any], *args: Any) -> Any:
        """``f(view of unit i, *args)``."""
        unit = self.units[i]
        pending = self._take(i)
        last = 0 < i == len(self.units) - 1
        views, fetched = unit.views(pending, unit.backward == "keep", self.previous, last)
        del pending
        self.previous = fetched or self.previous
        self._fetch_ahead(i + 1)
        with fetched.saving() if fetched else nullcontext():
            try:
                return unit.compute(f, views, args)
            except RuntimeError as error:
                if "saved tensor hooks" in str(error):
                    error.add_note(NO_TRANSFORM_INSIDE)
                raise

    def look(self, i: int) -> Any:
        """The view of unit i without a computation around it: it stays as long as it is used."""
        unit = self.units[i]
        views, _ = unit.views(self._take(i), True, None)
        return unit.plan.unflatten(views)

    def _take(self, i: int) -> _Pending:
        self.visited.add(i)
        pending = self.pending.pop(i, None)
        return self.units[i].fetch(self.shards[i]) if pending is None else pending

    def _fetch_ahead(self, i: int) -> None:
        if i < len(self.units) and i not in self.visited and i not in self.pending:
            self.pending[i] = self.units[i].fetch(self.shards[i])


def _recomputed(f: Callable[..., Any], view: Any, args: tuple[Any, ...]) -> Any:
    """``f(view, *args)`` as one node that keeps only its inputs."""
    leaves, spec = flatten((view, args))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    static = [None if isinstance(x, Tensor) else x for x in leaves]
    out: list[Any] = []  # structure and leaves of the result, the same at every call

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        every = list(static)
        for i, x in zip(places, tensors, strict=True):
            every[i] = x
        view, args = unflatten(spec, every)
        results, result_spec = flatten(f(view, *args))
        found = [i for i, y in enumerate(results) if isinstance(y, Tensor)]
        out[:] = [result_spec, found, [None if i in found else y for i, y in enumerate(results)]]
        return tuple(results[i] for i in found)

    flat.__name__ = getattr(f, "__name__", "f")
    tensors = closed(flat)(*(leaves[i] for i in places))
    result_spec, found, results = out[0], out[1], list(out[2])
    for i, y in zip(found, tensors, strict=True):
        results[i] = y
    return unflatten(result_spec, results)
