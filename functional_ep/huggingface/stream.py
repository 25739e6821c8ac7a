"""The leaves of a model as a stream: which are whole at the same time, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from functional_ep.box import Box, slices_of
from functional_ep.huggingface.lazy import Lazy
from functional_ep.huggingface.names import Module
from sharding import Comm, Plan
from sharding.mesh import Axes

PIECE = 1 << 22  # bytes that each rank sends at a time
ALIGN = 64


class Described(Protocol):
    """What ``to_huggingface`` has to know of a model; its source may be a config as well."""

    @property
    def skeleton(self) -> Any: ...
    @property
    def source(self) -> Any: ...
    @property
    def buffers(self) -> Mapping[str, Tensor]: ...


class Batch(NamedTuple):
    """Leaves that are whole at the same time, and the tensors of files that are made of them."""

    leaves: list[str]
    tensors: list[str]
    size: int


def leaves_of(
    module: Module, plan: Plan, model: Described, whole: Mapping[str, Tensor]
) -> dict[str, Lazy]:
    """The module's state dict, of leaves that are in ``whole`` when they are read."""
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    kept = dict[str, str]()  # of tied names the one that transformers does not make from another
    for name, first in module.first_name.items():
        if first not in kept or kept[first] in module.skeleton.all_tied_weights_keys:
            kept[first] = name
    if set(kept) != set(leaves):
        wrong = sorted(set(kept) ^ set(leaves))
        raise ValueError(f"plan and model differ in {wrong[:10]}: make_plan(model.shapes, ...)")
    tensors = {
        kept[first]: Lazy.stored(leaf.shape, leaf.dtype, Later(whole, first))
        for first, leaf in leaves.items()
    }
    lost = [name for name in module.buffers if name not in model.buffers]
    if lost:
        raise ValueError(f"model.buffers has no {lost[0]}, which transformers saves and loads")
    tensors |= {name: Lazy.of(model.buffers[name]) for name in module.buffers}
    for name in module.skeleton._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    return tensors


def cast(x: Lazy, dtype: torch.dtype) -> Lazy:
    """The same in another dtype, if it is made of leaves; buffers keep theirs."""
    of_leaves = all(isinstance(source.fill, Later) for source in x.sources())
    return Lazy(x.meta.to(dtype), x.fill, x.inputs) if of_leaves else x


class Later(NamedTuple):
    """Reads a leaf of the whole ones, which has to be among them by then."""

    whole: Mapping[str, Tensor]
    leaf: str

    def __call__(self, out: Tensor, box: Box) -> None:
        out.copy_(self.whole[self.leaf][slices_of(box)])


def batches_of(tensors: Mapping[str, Lazy], plan: Plan) -> Iterator[Batch]:
    """In the order of the files; as many leaves at a time as the largest conversion needs."""
    sizes = {leaf.path: math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plan.leaves}
    parts: dict[tuple[str, ...], list[str]] = {}
    for name, x in tensors.items():
        needs = {s.fill.leaf: None for s in x.sources() if isinstance(s.fill, Later)}
        parts.setdefault(tuple(needs), []).append(name)
    largest = max(sum(sizes[leaf] for leaf in leaves) for leaves in parts)
    batch = Batch([], [], 0)
    for leaves, names in parts.items():
        size = sum(sizes[leaf] for leaf in leaves)
        if batch.tensors and batch.size + size > largest:
            yield batch
            batch = Batch([], [], 0)
        batch = Batch(batch.leaves + list(leaves), batch.tensors + names, batch.size + size)
    yield batch


class Gathering:
    """Leaves of a batch, whole, in memory that serves one batch after the other."""

    def __init__(self, held: Mapping[str, Tensor], plan: Plan, comm: Comm) -> None:
        self.held, self.comm = held, comm
        layouts = zip(plan.leaves, plan.layouts, strict=True)
        self.layouts = {leaf.path: layout for leaf, layout in layouts}
        self.memory = torch.empty(0, dtype=torch.uint8, device=comm.device)

    @torch.no_grad()
    def whole(self, leaves: list[str]) -> dict[str, Tensor]:
        """Each leaf; it may be the shard itself, and is only read, until the next batch."""
        sizes = [self._nbytes(leaf) for leaf in leaves]
        if sum(sizes) > len(self.memory):
            self.memory = self.memory.new_empty(sum(sizes))
        parts = self.memory[: sum(sizes)].split(sizes)
        return {leaf: self._one(leaf, part) for leaf, part in zip(leaves, parts, strict=True)}

    def _nbytes(self, leaf: str) -> int:
        layout = self.layouts[leaf]
        entries = layout.shard_size * layout.mesh.count(layout.rule.axes)
        return -(-entries * layout.dtype.itemsize // ALIGN) * ALIGN

    def _one(self, leaf: str, memory: Tensor) -> Tensor:
        layout = self.layouts[leaf]
        flat = memory.view(layout.dtype)
        view = self._join(self.held[leaf], layout.rule.store, flat)[: layout.view_size]
        return self._join(view, layout.rule.compute, flat).view(layout.shape)

    def _join(self, part: Tensor, axes: Axes, out: Tensor) -> Tensor:
        """The parts of all ranks along ``axes``, one behind the other, a piece of each at a time.

        So that little is on its way at once; and ``out`` may begin with the part, since a piece is
        overwritten when it has been sent, and not before.
        """
        ranks, step = self.comm.mesh.count(axes), PIECE // part.element_size()
        if ranks == 1:
            return part
        rows = out[: ranks * len(part)].view(ranks, -1)
        for start in range(0, len(part), step):
            (pieces,) = self.comm.all_gather([part[start : start + step]], axes)
            rows[:, start : start + step] = pieces.view(ranks, -1)
        return rows.view(-1)
