"""Replica: a private copy of a model whose parameters are views, there while they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from functional_ep.compile import compiled, uncompiled
from functional_ep.huggingface.adapters import BLOCKS
from functional_ep.huggingface.experts import Kind, Place
from functional_ep.huggingface.owner import Owner, stand_in
from functional_ep.huggingface.parts import Part, parts
from functional_ep.huggingface.recording import Record
from sharding import Comm, Plan
from sharding.captured import Vouched
from sharding.mesh import Axes
from sharding.plain import outside_transforms, plain
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
        compile: bool,
    ) -> None:
        self.model: Any = copy.deepcopy(skeleton).train(training)
        self.plan, self.comm, self.backward, self.compile = plan, comm, backward, compile
        self.parts = parts(self.model)
        self.leaves = [part.leaves for part in self.parts]
        self.units = [
            Unit(plan.at([plan.tree[leaf] for leaf in leaves]), comm, backward)
            for leaves in self.leaves
        ]
        self.bound: set[int] = set()  # parts whose parameters are views now
        self.inside = False  # a part that is computed again in the backward pass
        self.walk: Walk | None = None
        self.chosen: dict[str, Tensor] = {}
        self.device = torch.device("meta")
        self.owners = [self._take_over(i, part) for i, part in enumerate(self.parts)]
        self.experts = {path: self._place_experts(path, kind) for path, kind in routed.items()}
        for module in self.model.modules():
            block = BLOCKS.get(type(module).__name__)
            if block is not None:
                module.forward = block(module)
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
        whole = self.plan.check_shards(shards, self.comm)
        self._move_to(whole[0].device)
        each = [[shards[leaf] for leaf in leaves] for leaves in self.leaves]
        self.chosen = {}
        try:
            with Walk(self.units, each) as self.walk:
                return self.model(**inputs)
        finally:
            self.walk = None
            self._unbind_all()

    # -- parameters --------------------------------------------------------------------------------

    def _take_over(self, i: int, part: Part) -> list[Owner]:
        """Whose parameters, by what name, are which view of the part."""
        forward = part.module.forward

        def run(views: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
            return forward(*args, **kwargs)  # the module has the views; here they are only seen

        run.__qualname__ = part.path  # as errors of the compiler name it
        compute = compiled(run) if self.compile and part.is_layer else run

        def visit(*args: Any, **kwargs: Any) -> Any:
            if i in self.bound or self.walk is None:
                return forward(*args, **kwargs)
            return self._visit(self.walk, i, compute, args, kwargs)

        part.module.forward = visit
        read = self._uncompiled(lambda: self._read(i))
        return [
            Owner.of(module, part, self.leaves[i], read)
            for module in dict.fromkeys(slot.module for slot in part.slots)
        ]

    def _uncompiled(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """What communicates is left alone where a layer that calls it is compiled."""
        return uncompiled(f) if self.compile else f

    def _visit(self, walk: Walk, i: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._refuse_inside(i)
        if self.backward != "recompute":
            return walk.visit(i, self._bound_call(i, run), args, kwargs)
        self._unbind_all()  # what was read before; it is gathered again if it is read again
        record = Record()
        # Its closure has all of the model, whose parameters are refused one by one (see _read).
        compute = Vouched(record.returned(self._bound_call(i, run)))
        return record.add(walk.visit(i, compute, args, kwargs))

    def _bound_call(self, i: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def compute(views: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
            before = self.inside
            self.inside = self.backward == "recompute"
            self._bind(i, views)
            try:
                return run(views, args, kwargs)
            finally:
                self._unbind(i)
                self.inside = before

        return compute

    def _bind(self, i: int, views: Sequence[Tensor]) -> None:
        self.bound.add(i)
        for owner in self.owners[i]:
            owner.bind(views)

    def _unbind(self, i: int) -> None:
        self.bound.discard(i)
        for owner in self.owners[i]:
            owner.unbind()

    def _unbind_all(self) -> None:
        for i in tuple(self.bound):
            self._unbind(i)

    def _read(self, i: int) -> None:
        """Gather a part that is read outside of its call; it stays until the model returns.

        Or until another is called that is computed again later, and could not have it then.
        """
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
        with outside_transforms():  # they stay
            for module in self.model.modules():
                for name, value in module._buffers.items():
                    module._buffers[name] = None if value is None else value.to(device)
            for unit, owners in zip(self.units, self.owners, strict=True):
                layouts = unit.plan.layouts
                absent = [stand_in(w.shape, w.compute_dtype, device) for w in layouts]
                for owner in owners:
                    owner.absent.update(owner.values(absent))

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
                self.chosen[path] = plain(ids)

        place = Place(experts, axes, self.comm, chosen)
        module.forward = self._uncompiled(kind.forward(module, place))
        return experts


def expert_axes(plan: Plan, leaves: Sequence[str]) -> Axes:
    """The mesh axes that split these leaves while computing."""
    found = {leaf: plan.rules[plan.tree[leaf].label].compute for leaf in leaves}
    if len(set(found.values())) != 1:
        raise ValueError(f"experts of one layer are split differently: {found}. Give them one rule")
    return found[leaves[0]]


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
