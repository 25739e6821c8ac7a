"""Parts: what of a state each rank writes. Every entry is written once, whoever holds copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_ep.checkpoint.manifest import PARAMS, tensor_name
from functional_ep.safetensors_file import NAMES
from functional_ep.state import State, check_moment_name
from sharding import Comm, Plan
from sharding.gather import Layout
from sharding.tree import show

SHARE = 2**16  # bytes: what is smaller than two of them is not worth dividing among its holders


class Part(NamedTuple):
    """``ravel(leaf)[lo:hi]`` of the parameter or of a moment, in memory of the state."""

    leaf: int
    role: str
    path: str
    frozen: bool
    lo: int
    hi: int
    x: Tensor

    @property
    def name(self) -> str:
        return tensor_name(self.role, self.path, self.lo, self.hi)


def parts_of(state: State, plan: Plan, comm: Comm) -> list[Part]:
    """This rank's part of every tensor, in the order of the leaves; some are empty.

    Raises:
        ValueError: a state that is not of the plan, or was donated; what no file can hold.
    """
    if not isinstance(state, State):
        raise ValueError(f"a State is saved, not {type(state).__name__}: State(step, params, opt)")
    if state.step.numel() == 0:
        raise ValueError("this state was donated to a step: save the one that the step returned")
    moments = moments_by_path(state, plan)
    shards = plan.check_shards(state.params, comm)
    parts: list[Part] = []
    for i, (leaf, layout, shard) in enumerate(zip(plan.leaves, plan.layouts, shards, strict=True)):
        for role, x in ({PARAMS: shard} | moments[leaf.path]).items():
            _refuse_unfit(role, leaf.path, layout, x)
            first, _ = layout.interval(comm.rank)
            lo, hi = share(layout, comm.rank, x.dtype.itemsize, i)
            flat = x.detach()[lo - first : hi - first]
            parts.append(Part(i, role, leaf.path, layout.frozen, lo, hi, flat))
    return parts


def moments_by_path(state: State, plan: Plan) -> dict[str, dict[str, Tensor]]:
    """``{path: {moment: shard}}``, for every leaf; frozen ones have none."""
    labels = {leaf.path: leaf.label for leaf in plan.leaves}
    if set(state.opt) != set(plan.trained):
        raise ValueError(
            f"the state has optimizer states for {sorted(state.opt)}, but the plan trains "
            f"{sorted(plan.trained)}: save with the plan that the state was made for"
        )
    found: dict[str, dict[str, Tensor]] = {path: {} for path in labels}
    for label, moments in state.opt.items():
        for name, by_path in moments.items():
            check_moment_name(name, f"state.opt[{label!r}][{name!r}]")
            lacking = {path for path, its in labels.items() if its == label} ^ set(by_path)
            if lacking:
                where = show(min(lacking), f"state.opt[{label!r}][{name!r}]")
                raise ValueError(f"{where} is missing or left over: every leaf of a label has one")
            for path, x in by_path.items():
                found[path][name] = x
    return found


def _refuse_unfit(role: str, path: str, layout: Layout, x: Tensor) -> None:
    if role != PARAMS and x.shape != (layout.shard_size,):
        raise ValueError(
            f"{show(path, f'moment {role!r} of params')}: a shard ({layout.shard_size},) like the "
            f"parameter's expected, found {tuple(x.shape)}"
        )
    if x.dtype not in NAMES:
        raise ValueError(f"{show(path, role)} is {x.dtype}, which a safetensors file cannot hold")


def share(layout: Layout, rank: int, itemsize: int, turn: int) -> tuple[int, int]:
    """The interval that this rank writes, of the one that it holds like all of its copies.

    They divide it evenly if it is large; else one writes it, another one for every ``turn``.

    >>> from sharding import Mesh, replicated
    >>> layout = Layout(replicated(), Mesh(edp=2), (2**16,), torch.float32)
    >>> [share(layout, rank, 4, turn=0) for rank in range(2)]
    [(0, 32768), (32768, 65536)]
    """
    lo, hi = layout.interval(rank)
    copies = layout.rule.copies(layout.mesh)
    holders = layout.mesh.count(copies)
    writers = max(1, min(holders, (hi - lo) * itemsize // SHARE))
    place = (layout.mesh.index(rank, copies) - turn) % holders
    if place >= writers:
        return lo, lo
    return lo + (hi - lo) * place // writers, lo + (hi - lo) * (place + 1) // writers


def on_cpu(parts: list[Part]) -> list[Part]:
    """The same parts, copied if they are elsewhere."""
    return [part._replace(x=part.x.cpu()) for part in parts]


class Buffers:
    """Memory for copies of parts, kept from one save to the next."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def copies(self, parts: Sequence[Part]) -> list[Part]:
        """The same parts, in CPU memory that no step writes into: of what is frozen, its own."""
        copies = list(self._copies(parts))
        for device in {part.x.device for part in parts if part.x.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # the host has not waited for any yet
        return copies

    def _copies(self, parts: Sequence[Part]) -> Iterator[Part]:
        for part in parts:
            if part.frozen and not part.x.is_cuda:
                yield part
                continue
            held = self._memory.get(part.name)
            if held is None or held.dtype != part.x.dtype:
                held = torch.empty(part.x.shape, dtype=part.x.dtype, pin_memory=part.x.is_cuda)
                self._memory[part.name] = held
            yield part._replace(x=held.copy_(part.x, non_blocking=part.x.is_cuda))
