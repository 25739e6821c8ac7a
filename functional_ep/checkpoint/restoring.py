"""Restoring: a state for any plan, of which every rank reads its own intervals."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_ep.agreement import check_agreement, together
from functional_ep.checkpoint.disk import DISK, Disk
from functional_ep.checkpoint.folder import read_manifest
from functional_ep.checkpoint.manifest import PARAMS, Entry, Manifest, to_bytes
from functional_ep.checkpoint.reader import Reader, Wanted
from functional_ep.optim import Moments
from functional_ep.sealed import digest
from functional_ep.state import State, moments_in_common
from sharding import Comm, Plan
from sharding.gather import Layout
from sharding.leaf import Leaf

LISTED = 8  # names in an error message
READERS = 4  # threads


def restore(
    path: str | Path,
    plan: Plan,
    comm: Comm,
    *,
    verify: bool = True,
    cast: bool = False,
    disk: Disk = DISK,
) -> State:
    """The state that was saved, on any mesh, under any rules and labels: training goes on.

    Every rank reads what its shards are made of, block by block, and nothing else; nothing travels
    between ranks. On the plan that it was saved from, the state is the saved one to the bit; labels
    that are frozen now leave their moments behind.

    Args:
        path: of :func:`save`. Nothing in it is ever executed.
        plan: where the state is to live: the same leaves, by path and shape.
        comm: the ranks; all must call.
        verify: compare the digest of every block that is read with the manifest's.
        cast: convert parameters, and moments that had the parameter's dtype, to the plan's dtypes.
        disk: the operations on files.

    Raises:
        FileNotFoundError: no checkpoint; the message says what is there instead.
        ValueError: leaves that are missing or left over; another shape, or dtype without ``cast``;
            a leaf that was frozen and is to be trained; a file that is damaged, or of another run,
            with leaf, piece and file; a format from the future. All ranks raise alike.

    >>> from tempfile import TemporaryDirectory
    >>> from sharding import Mesh, make_plan, replicated, simulate, zero3
    >>> from functional_ep import init_state, save, sgd
    >>> params, labels = {"w": torch.arange(3.0)}, {"w": "dense"}
    >>> here = make_plan(params, labels, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> there = make_plan(params, labels, {"dense": replicated()}, Mesh(ep=1))
    >>> def write(comm, path):
    ...     save(path, init_state(here.shard(params, comm), here, sgd(0.1)), here, comm)
    >>> with TemporaryDirectory() as path:
    ...     _ = simulate(write, here.mesh, [path] * 2)
    ...     simulate(lambda comm: restore(path, there, comm), there.mesh)[0].params["w"]
    tensor([0., 1., 2.])
    """
    reader = _open(Path(path), plan, comm, verify, disk)
    return together(lambda: _state(reader, plan, comm, cast), comm)


def restore_params(
    path: str | Path,
    plan: Plan,
    comm: Comm,
    *,
    verify: bool = True,
    cast: bool = False,
    disk: Disk = DISK,
) -> Any:
    """``restore(path, plan, comm).params``, but moments are neither read nor needed.

    For evaluation, or to begin another training from: leaves that were frozen may be trained.
    Arguments and errors are those of :func:`restore`.

    >>> from tempfile import TemporaryDirectory
    >>> from sharding import Mesh, make_plan, replicated, simulate
    >>> from functional_ep import adamw, init_state, save
    >>> params = {"w": torch.arange(3.0)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": replicated()}, Mesh())
    >>> def program(comm, path):
    ...     save(path, init_state(plan.shard(params, comm), plan, adamw(0.1)), plan, comm)
    ...     return restore_params(path, plan, comm)
    >>> with TemporaryDirectory() as path:
    ...     simulate(program, plan.mesh, [path])
    [{'w': tensor([0., 1., 2.])}]
    """
    reader = _open(Path(path), plan, comm, verify, disk)
    return together(lambda: _params(reader, plan, comm, cast), comm)


def _open(path: Path, plan: Plan, comm: Comm, verify: bool, disk: Disk) -> Reader:
    plan.check_mesh(comm)
    manifest = together(lambda: read_manifest(path, disk), comm)
    text = f"step {manifest.step}\nmanifest {digest(to_bytes(manifest))}"
    check_agreement(text, "checkpoint", comm)
    return Reader(path, manifest, disk, verify=verify)


def _state(reader: Reader, plan: Plan, comm: Comm, cast: bool) -> State:
    """What needs no reading is compared first; then all tensors are read."""
    _refuse_others(reader.manifest, plan, cast)
    entries = {entry.path: entry for entry in reader.manifest.leaves}
    frozen = {path for path, entry in entries.items() if entry.frozen}
    paths = {
        label: [leaf.path for leaf in plan.leaves if leaf.label == label] for label in plan.trained
    }
    names = {
        label: moments_in_common(
            label, {p: [n for n in entries[p].tensors if n != PARAMS] for p in its}, frozen
        )
        for label, its in paths.items()
    }
    tensors = [(PARAMS, leaf.path) for leaf in plan.leaves]
    tensors += [(name, path) for label in paths for name in names[label] for path in paths[label]]
    found = _read_all(reader, tensors, plan, comm)
    opt: dict[str, Moments] = {
        label: {name: {path: found[name, path] for path in its} for name in names[label]}
        for label, its in paths.items()
    }
    params = plan.unflatten([found[PARAMS, leaf.path] for leaf in plan.leaves])
    return State(torch.tensor(reader.manifest.step, dtype=torch.int64), params, opt)


def _params(reader: Reader, plan: Plan, comm: Comm, cast: bool) -> Any:
    _refuse_others(reader.manifest, plan, cast)
    tensors = [(PARAMS, leaf.path) for leaf in plan.leaves]
    return plan.unflatten(list(_read_all(reader, tensors, plan, comm).values()))


def _read_all(
    reader: Reader, tensors: list[tuple[str, str]], plan: Plan, comm: Comm
) -> dict[tuple[str, str], Tensor]:
    """This rank's shards by role and path, a few at a time: threads read side by side."""
    entries = {entry.path: entry for entry in reader.manifest.leaves}
    layouts = {leaf.path: layout for leaf, layout in zip(plan.leaves, plan.layouts, strict=True)}

    def read(tensor: tuple[str, str]) -> Tensor:
        role, path = tensor
        return _read(reader, Wanted(entries[path], role), layouts[path], comm)

    with ThreadPoolExecutor(READERS) as beside:
        return dict(zip(tensors, beside.map(read, tensors), strict=True))


def _read(reader: Reader, wanted: Wanted, layout: Layout, comm: Comm) -> Tensor:
    """This rank's shard of a tensor; a moment that is like its parameter is cast like it."""
    like = wanted.dtype == wanted.entry.tensors[PARAMS].dtype
    lo, hi = layout.interval(comm.rank)
    dtype = layout.dtype if like else wanted.dtype
    shard = torch.empty(layout.shard_size, dtype=dtype, device=comm.device)
    reader.fill(wanted, lo, shard[: hi - lo])
    shard[hi - lo :] = 0
    return shard


def _refuse_others(manifest: Manifest, plan: Plan, cast: bool) -> None:
    """Refuse a checkpoint of other leaves than the plan's."""
    saved = {entry.path: entry for entry in manifest.leaves}
    wanted = {leaf.path: leaf for leaf in plan.leaves}
    if saved.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - saved), sorted(saved.keys() - wanted)
        near = [
            f"{path} may be {match[0]}"
            for path in missing[:LISTED]
            if (match := get_close_matches(path, extra, n=1))
        ]
        raise ValueError(
            f"the checkpoint is of other leaves: it lacks {_list(missing)}; it has, and the plan "
            f"lacks, {_list(extra)}" + (f". {', '.join(near)}" if near else "")
        )
    for path, leaf in wanted.items():
        _refuse_other(saved[path], leaf, cast)


def _refuse_other(entry: Entry, leaf: Leaf, cast: bool) -> None:
    dtype = entry.tensors[PARAMS].dtype
    if entry.shape != leaf.shape:
        raise ValueError(f"{leaf} expected, but {entry.shape} was saved: it is another model's")
    if dtype != leaf.dtype and not cast:
        raise ValueError(
            f"{leaf} {leaf.dtype} expected, but {dtype} was saved: make the plan of params of that "
            "dtype, or convert while reading, with cast=True"
        )


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{names[:LISTED]}{more}" if names else "nothing"
