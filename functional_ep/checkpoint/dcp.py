"""Exchange with torch.distributed.checkpoint: its directories, written and read, by boxes.

That format keeps tensors as boxes; an interval is a few of them. Its table of contents is a pickle,
of which only the classes that it needs are let in, and its tensors are read as weights only. It has
no digests and no instant of commitment: it is for exchange, :func:`functional_ep.save` for keeping.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_ep.agreement import gather_bytes, together
from functional_ep.box import boxes, sizes_of
from functional_ep.checkpoint.boxed import (
    STEP,
    Boxed,
    Wanted,
    make_metadata,
    read_metadata,
    save_box,
)
from functional_ep.checkpoint.disk import DISK, make_directories, write_all
from functional_ep.checkpoint.manifest import PARAMS
from functional_ep.checkpoint.parts import Part, on_cpu, parts_of
from functional_ep.optim import Moments
from functional_ep.safetensors_file import NAMES
from functional_ep.state import State, moments_in_common
from sharding import Comm, Plan
from sharding.gather import Layout
from sharding.leaf import Leaf

METADATA = ".metadata"
NameOf = Callable[[str, str], str]


def dcp_name(role: str, path: str) -> str:
    """The name of a tensor: that of the nested dict ``{"params": params, "opt": {"m": ...}}``.

    >>> dcp_name("params", "blocks/0/w"), dcp_name("m", "w")
    ('params.blocks.0.w', 'opt.m.w')
    """
    if "." in role:
        raise ValueError(f"moment {role!r} would be taken for a path: give a name_of, or rename it")
    top = PARAMS if role == PARAMS else f"opt.{role}"
    return f"{top}.{path.replace('/', '.')}"


def to_dcp(
    path: str | Path, state: State, plan: Plan, comm: Comm, *, name_of: NameOf = dcp_name
) -> None:
    """A directory that ``torch.distributed.checkpoint.load`` reads, on any number of ranks.

    Args:
        path: a directory that does not exist yet.
        state: of ``plan``.
        plan: what the state's shards are shards of.
        comm: the ranks; all must call.
        name_of: the name of a tensor by role, ``params`` or a moment's name, and path of the leaf.

    Raises:
        FileExistsError: a path at which there is something.
        ValueError: a state that is not of the plan; two tensors of one name, or, without a
            ``name_of``, a moment with a dot in its name.
    """
    path = Path(path)
    parts = together(lambda: _named(on_cpu(parts_of(state, plan, comm)), name_of), comm)
    growing = path.with_name(f".{path.name}.incomplete")

    def begin() -> None:
        if path.exists():
            raise FileExistsError(f"{path} exists: choose another path, or move it away")
        shutil.rmtree(growing, ignore_errors=True)
        make_directories(growing, DISK)

    def write() -> dict[str, Any]:
        return _write(growing / f"__{comm.rank}_0.distcp", parts, plan, name_of)

    def commit() -> None:
        content = pickle.dumps(make_metadata(records, growing, int(state.step)))
        write_all(growing / METADATA, [memoryview(content)], DISK)
        DISK.sync_directory(growing)
        DISK.rename(growing, path)
        DISK.sync_directory(path.parent)

    try:
        together(begin if comm.rank == 0 else lambda: None, comm)
        record = together(write, comm)
        records = [json.loads(each) for each in gather_bytes(json.dumps(record).encode(), comm)]
        together(commit if comm.rank == 0 else lambda: None, comm)
    except BaseException:
        if comm.rank == 0:
            shutil.rmtree(growing, ignore_errors=True)
        raise


def _named(parts: list[Part], name_of: NameOf) -> list[Part]:
    """The same parts, if no two tensors would have one name."""
    owners = {STEP: STEP}
    for part in parts:
        name, owner = name_of(part.role, part.path), f"{part.role} of {part.path!r}"
        if owners.setdefault(name, owner) != owner:
            raise ValueError(
                f"{owners[name]} and {owner} would both be {name!r}: give a name_of that tells "
                "them apart"
            )
    return parts


def _write(file: Path, parts: Sequence[Part], plan: Plan, name_of: NameOf) -> dict[str, Any]:
    """A rank's file: of each tensor, which boxes are in it and where; and the tensors there are."""
    shapes = {leaf.path: leaf.shape for leaf in plan.leaves}
    entries: list[Any] = []
    with open(file, "wb") as stream:
        for part in parts:
            start, name = 0, name_of(part.role, part.path)
            for box in boxes(part.lo, part.hi, shapes[part.path]):
                sizes = sizes_of(box)
                size = math.prod(sizes)
                place = save_box(stream, part.x[start : start + size].view(sizes))
                entries.append((name, box, file.name, *place))
                start += size
        stream.flush()
        os.fsync(stream.fileno())
    tensors = {
        name_of(part.role, part.path): (shapes[part.path], NAMES[part.x.dtype]) for part in parts
    }
    return {"entries": entries, "shapes": tensors}


def from_dcp(
    path: str | Path,
    plan: Plan,
    comm: Comm,
    *,
    moments: Sequence[str] | None = None,
    name_of: NameOf = dcp_name,
    cast: bool = False,
) -> State:
    """The state in a directory of ``torch.distributed.checkpoint``, for any plan.

    Every rank reads the chunks that its shards lie in, one after the other. Tensors that no leaf
    asks for are left alone.

    Args:
        path: what :func:`to_dcp` wrote, or ``torch.distributed.checkpoint.save``.
        plan: where the state is to live.
        comm: the ranks; all must call.
        moments: which to look for: a label that is trained has those that are there for it. By
            default all that are named as by :func:`dcp_name`; with a ``name_of``, say which.
        name_of: see :func:`to_dcp`.
        cast: convert parameters, and moments that had the parameter's dtype, to the plan's dtypes.

    Returns:
        The state; its step is 0 where none was saved under the name ``step``.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: a table of contents with anything in it that is no part of one; a tensor that is
            missing, or has another shape, or dtype without ``cast``; a moment that no leaf has, or
            a part of a label; chunks that leave a gap.

    >>> from tempfile import TemporaryDirectory
    >>> from sharding import Mesh, make_plan, replicated, simulate
    >>> params = {"w": torch.arange(3.0)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": replicated()}, Mesh())
    >>> def program(comm, path):
    ...     state = State(torch.tensor(7), plan.shard(params, comm), {"dense": {}})
    ...     to_dcp(path, state, plan, comm)
    ...     return from_dcp(path, plan, comm)
    >>> with TemporaryDirectory() as directory:
    ...     simulate(program, plan.mesh, [directory + "/exchange"])[0].params
    {'w': tensor([0., 1., 2.])}
    """
    plan.check_mesh(comm)
    if moments is None and name_of is not dcp_name:
        raise ValueError(
            "with a name_of, moments cannot be told by their names: say which there may be, such "
            "as moments=('m', 'v'), or () for none"
        )

    def read() -> State:
        boxed = Boxed(Path(path), read_metadata(Path(path) / METADATA))

        def shard(role: str, leaf: Leaf, layout: Layout) -> Tensor:
            lo, hi = layout.interval(comm.rank)
            dtype = _dtype(boxed, role, leaf, name_of, cast)
            x = torch.zeros(layout.shard_size, dtype=dtype)
            boxed.fill(Wanted(role, leaf, name_of(role, leaf.path)), lo, x[: hi - lo])
            return x.to(comm.device)

        places = list(zip(plan.leaves, plan.layouts, strict=True))
        params = plan.unflatten([shard(PARAMS, *place) for place in places])
        opt: dict[str, Moments] = {
            label: {
                name: {
                    leaf.path: shard(name, leaf, layout)
                    for leaf, layout in places
                    if leaf.label == label
                }
                for name in names
            }
            for label, names in _moments(boxed, plan, moments, name_of).items()
        }
        return State(torch.tensor(boxed.step()), params, opt)

    return together(read, comm)


def _moments(
    boxed: Boxed, plan: Plan, asked: Sequence[str] | None, name_of: NameOf
) -> dict[str, list[str]]:
    """By label, the moments that its leaves have in the directory."""
    there = boxed.metadata.state_dict_metadata
    names = [name.split(".") for name in there]
    roles = dict.fromkeys(name[1] for name in names if name[0] == "opt" and name[2:])
    leaves = [leaf for label in plan.trained for leaf in plan.leaves if leaf.label == label]
    for role in asked or ():
        wanted = [Wanted(role, leaf, name_of(role, leaf.path)) for leaf in leaves]
        if wanted and not any(each.name in there for each in wanted):
            boxed.dtype(wanted[0])  # which says what is there instead
    held: dict[str, dict[str, list[str]]] = {label: {} for label in plan.trained}
    for leaf in leaves:
        its = [r for r in (roles if asked is None else asked) if name_of(r, leaf.path) in there]
        held[leaf.label][leaf.path] = its
    return {label: moments_in_common(label, its, frozen=()) for label, its in held.items()}


def _dtype(boxed: Boxed, role: str, leaf: Leaf, name_of: NameOf, cast: bool) -> torch.dtype:
    """A parameter is of the plan's dtype, and so is a moment that was saved in the parameter's."""
    parameter, wanted = (Wanted(r, leaf, name_of(r, leaf.path)) for r in (PARAMS, role))
    saved, found = boxed.dtype(parameter), boxed.dtype(wanted)
    if saved != leaf.dtype and not cast:
        raise ValueError(
            f"{parameter} {leaf.dtype} expected, but {parameter.name!r} in {boxed.path} is "
            f"{saved}: convert it with cast=True"
        )
    return leaf.dtype if found == saved else found
