"""Replica: a private copy of a model whose parameters are views, there while they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from functional_ep.huggingface.adapters import SYMMETRIC
from functional_ep.huggingface.experts import Kind, Place
from functional_ep.huggingface.parts import Part, parts
from functional_ep.huggingface.recording import Record
from sharding import Comm, Plan
from sharding.mesh import Axes
from sharding.walk import Backward, Unit, Walk

Routed = Mapping[str, Kind]


class Replica:
    """``replica(shards, **inputs) = model(**inputs)`` with this rank's experts and these shards.

    The model's own forward drives: each part is gathered when it is called, and what is read
    outside of a call when it is read. No module is shared with another replica, since simulated
    ranks take turns inside of the same code.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        buffers: Mapping[str, Tensor],
        routed: Routed,
        plan: Plan,
        comm: Comm,
        backward: Backward,
        training: bool,
    ) -> None:
        self.model: Any = copy.deepcopy(skeleton).train(training)
        self.plan, self.comm, self.backward = plan, comm, backward
        self.parts = parts(self.model)
        self.units = [
            Unit(plan.at([plan.tree[leaf] for leaf in part.leaves]), comm, backward)
            for part in self.parts
        ]
        self.bound: set[int] = set()  # parts whose parameters are views now
        self.inside = False  # a part that is computed again in the backward pass
        self.walk: Walk | None = None
        self.chosen: dict[str, Tensor] = {}
        self.device = torch.device("meta")
        self.slots = [self._take_over(i, part) for i, part in enumerate(self.parts)]
        self.experts = {path: self._place_experts(path, kind) for path, kind in routed.items()}
        for module in self.model.modules():
            symmetric = SYMMETRIC.get(type(module).__name__)
            if symmetric is not None:
                module.forward = symmetric(module)
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", False):
                config.use_cache = False  # of this copy: a pass over whole sequences
        for name, value in buffers.items():
            _owner(self.model, name)._buffers[name.rpartition(".")[2]] = value.clone()

    def __call__(self, shards: Mapping[str, Tensor], **inputs: Any) -> Any:
        if self.walk is not None:
            raise RuntimeError("a forward pass of this function is under way on this rank")
        if self.backward == "recompute" and (
            inputs.get("use_cache") or "past_key_values" in inputs
        ):
            raise ValueError("a cache would be written to twice under backward='recompute'")
        leaves = self.plan.flatten(shards, "shards")
        self._move_to(leaves[0].device)
        each = [[shards[leaf] for leaf in part.leaves] for part in self.parts]
        self.chosen = {}
        try:
            with Walk(self.units, each) as self.walk:
                return self.model(**inputs)
        finally:
            self.walk = None
            for i in tuple(self.bound):
                self._bind(i, self.empty[i])

    # -- parameters --------------------------------------------------------------------------------

    def _take_over(self, i: int, part: Part) -> list[tuple[_Parameters, str, int]]:
        """Whose parameters, by what name, are which view of the part."""
        for module in dict.fromkeys(slot.module for slot in part.slots):
            module.__dict__["_parameters"] = _Parameters(module._parameters, i, self._read)
        forward = part.module.forward

        def visit(*args: Any, **kwargs: Any) -> Any:
            return self._visit(i, forward, args, kwargs)

        part.module.forward = visit
        leaves: Any = part.leaves
        return [
            (s.module.__dict__["_parameters"], s.attribute, leaves.index(s.leaf))
            for s in part.slots
        ]

    def _visit(self, i: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if i in self.bound or self.walk is None:
            return forward(*args, **kwargs)
        self._refuse_inside(i)
        if self.backward != "recompute":
            return self.walk.visit(i, self._bound_call(i, forward), args, kwargs)
        record = Record()
        compute = record.returned(self._bound_call(i, forward))
        return record.add(self.walk.visit(i, compute, args, kwargs))

    def _bound_call(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def compute(views: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
            with self._with_views(i, views):
                return forward(*args, **kwargs)

        return compute

    @contextmanager
    def _with_views(self, i: int, views: Sequence[Tensor]) -> Iterator[None]:
        before = self.inside
        self.inside = self.backward == "recompute"
        self._bind(i, views)
        try:
            yield
        finally:
            self._bind(i, self.empty[i])
            self.inside = before

    def _bind(self, i: int, values: Sequence[Any]) -> None:
        (self.bound.discard if values is self.empty[i] else self.bound.add)(i)
        for parameters, name, place in self.slots[i]:
            parameters[name] = values[place]

    def _read(self, i: int) -> None:
        """Gather a part that is read outside of its call; it stays until the model returns."""
        if self.walk is not None and i not in self.bound:
            self._refuse_inside(i)
            self._bind(i, self.walk.look(i))

    def _refuse_inside(self, i: int) -> None:
        if self.inside:
            raise ValueError(
                f"{self.parts[i].path}: its parameters are used while another part is computed, "
                "and would lose their gradient when that is computed again. Use "
                "backward='regather' instead of 'recompute'"
            )

    def _move_to(self, device: torch.device) -> None:
        """Buffers, and what stands for parameters in between: right in dtype, shape and device."""
        if device == self.device:
            return
        self.device = device
        for module in self.model.modules():
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else value.to(device)
        self.empty = [
            [_stand_in(w.shape, w.compute_dtype, device) for w in unit.plan.layouts]
            for unit in self.units
        ]
        for i, empty in enumerate(self.empty):
            self._bind(i, empty)

    # -- experts -----------------------------------------------------------------------------------

    def _place_experts(self, path: str, kind: Kind) -> int:
        module = self.model.get_submodule(path)
        leaves = [f"{path}.{name}" for name in kind.stacked(module)]
        experts = kind.experts(module)
        axes = expert_axes(self.plan, leaves)
        if experts % self.plan.mesh.count(axes):
            raise ValueError(
                f"{path}: {experts} experts do not divide by the {self.plan.mesh.count(axes)} "
                f"ranks along {axes} of {self.plan.mesh}"
            )

        def chosen(ids: Tensor) -> None:
            if self.walk is not None:  # and not when it is computed again in the backward pass
                self.chosen[path] = ids.detach()

        module.forward = kind.forward(module, Place(experts, axes, self.comm, chosen))
        return experts


def expert_axes(plan: Plan, leaves: Sequence[str]) -> Axes:
    """The mesh axes that split these leaves while computing."""
    found = {leaf: plan.rules[plan.tree[leaf].label].compute for leaf in leaves}
    if len(set(found.values())) != 1:
        raise ValueError(f"experts of one layer are split differently: {found}. Give them one rule")
    return found[leaves[0]]


class _Parameters(dict[str, Any]):
    """A module's parameters; reading one that is not there has its part gathered."""

    def __init__(self, values: Mapping[str, Any], part: int, read: Callable[[int], None]) -> None:
        super().__init__(values)
        self.part, self.read = part, read

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if type(value) is nn.Parameter:  # isinstance takes a microsecond here
            self.read(self.part)
            return super().__getitem__(name)
        return value


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter that takes no memory, and shows if it is computed with."""
    nothing = torch.full((), torch.nan, dtype=dtype, device=device)
    return nn.Parameter(nothing.expand(shape), requires_grad=False)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
