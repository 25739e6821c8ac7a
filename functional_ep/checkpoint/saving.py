"""Saving: payload files, then one manifest; the save happens when that gets its name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_ep.agreement import check_agreement, common_failure, gather_bytes, together
from functional_ep.checkpoint import digest
from functional_ep.checkpoint.disk import DISK, Disk, make_directories
from functional_ep.checkpoint.folder import claimed, put_manifest, refuse_foreign, sweep
from functional_ep.checkpoint.manifest import (
    Attached,
    Entry,
    Manifest,
    Payload,
    Piece,
    Stored,
    refuse_gaps,
)
from functional_ep.checkpoint.parts import Part, on_cpu, parts_of
from functional_ep.checkpoint.payload import write_attached, write_payloads
from functional_ep.state import State
from sharding import Comm, Plan

NAME_BYTES = 200  # of an attached file: with a digest before it, it is still a file name
Content = bytes | str | Path


def save(
    path: str | Path,
    state: State,
    plan: Plan,
    comm: Comm,
    *,
    metadata: Any = None,
    files: Mapping[str, Content] | None = None,
    disk: Disk = DISK,
) -> None:
    """``restore(path, plan, comm) == state``, for this plan and, as whole leaves, for any other.

    ``path`` becomes a directory: each rank writes the intervals that it holds to a safetensors
    file, copies once; rank 0 writes ``manifest.json``, with a digest of every block, taken from
    memory before it was written. All ranks need the directory's file system. The save happens at
    one instant, when the manifest gets its name: a crash before leaves what was at ``path``, whole,
    a crash after it the new state.

    Args:
        path: a new directory, an empty one, or a checkpoint, which is replaced.
        state: of ``plan``, the same step on all ranks.
        plan: what the state's shards are shards of.
        comm: the ranks; all must call.
        metadata: what JSON can say, the same on all ranks; ``describe(path).metadata``.
        files: small files that belong to the checkpoint, such as a tokenizer's, by their names:
            paths or bytes, of which rank 0's count.
        disk: the operations on files.

    Raises:
        ValueError, TypeError: a state that is not of the plan; metadata that JSON cannot say.
        FileExistsError: a path at which there is something else.
        BlockingIOError: another process is saving to this path; nothing there has changed.
        OSError: a full or read-only disk, say. Every error is raised on all ranks alike and names
            the rank that had it; what was saved at ``path`` before is still there.

    >>> from tempfile import TemporaryDirectory
    >>> from sharding import Mesh, make_plan, simulate, zero3
    >>> from functional_ep import init_state, restore, sgd
    >>> params = {"w": torch.arange(3.0)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> def program(comm, path):
    ...     save(path, init_state(plan.shard(params, comm), plan, sgd(0.1)), plan, comm)
    ...     return restore(path, plan, comm).params
    >>> with TemporaryDirectory() as path:
    ...     simulate(program, plan.mesh, [path] * 2)
    [{'w': tensor([0., 1.])}, {'w': tensor([2., 0.])}]
    """
    extras = Extras(metadata, files or {})
    saving = Saving(Path(path), state, plan, comm, extras=extras, copies=on_cpu, disk=disk)
    saving.write()
    saving.commit()


class Extras(NamedTuple):
    """What rides along: metadata, and files by name."""

    metadata: Any
    files: Mapping[str, Content]


class Saving:
    """One save. It begins and commits on all ranks together; between, each writes for itself.

    ``write`` neither communicates nor raises, so that any thread may run it while the ranks train:
    what goes wrong is told to all of them by ``commit``.
    """

    def __init__(
        self,
        path: Path,
        state: State,
        plan: Plan,
        comm: Comm,
        *,
        extras: Extras,
        copies: Callable[[list[Part]], list[Part]],
        disk: Disk,
    ) -> None:
        self.path, self.plan, self.comm, self.disk = path, plan, comm, disk
        parts, text = together(lambda: _checked(state, plan, comm, extras), comm)
        self.step, self.metadata, self.block = int(state.step), extras.metadata, digest.BLOCK
        check_agreement(f"{text}\nstep {self.step}\npath {path}", "state to save", comm)
        self.parts = together(lambda: copies(parts), comm)
        self.held = ExitStack()  # rank 0 holds the directory, for all ranks
        self.files = together(lambda: self._begin(extras.files), comm)
        self.error: Exception | None = None
        self.record: dict[str, Any] = {}

    def _begin(self, files: Mapping[str, Content]) -> dict[str, bytes]:
        """Refuse what is not ours to overwrite; make the directory, tidy it, fetch the files."""
        if self.comm.rank:
            return {}
        contents = {name: _content(name, given) for name, given in files.items()}
        refuse_foreign(self.path, self.disk)
        try:
            make_directories(self.path, self.disk)
            self.held.enter_context(claimed(self.path, self.disk))
            sweep(self.path, self.disk)
        except OSError:
            self.held.close()
            with suppress(OSError), claimed(self.path, self.disk):
                self._discard()
            raise
        return contents

    def write(self, earlier: Path | None = None) -> None:
        """This rank's files. ``earlier``: a checkpoint that may have some of them already."""
        try:
            self.record["files"] = write_attached(self.path, self.files, earlier, self.disk)
            written = write_payloads(
                self.path,
                self.parts,
                self.comm.rank,
                block=self.block,
                earlier=earlier,
                disk=self.disk,
            )
            self.record |= written._asdict()
        except Exception as error:
            self.error = error

    def commit(self) -> None:
        """Together: all that was written becomes the checkpoint, or none of it does."""
        with self.held:
            failure = common_failure(self.error, self.comm)
            if failure is None:
                records = gather_bytes(json.dumps(self.record).encode(), self.comm)
                failure = self._lead(lambda: self._put([json.loads(record) for record in records]))
            if failure is not None:
                self._lead(self._discard)
                raise failure from (None if failure is self.error else self.error)

    def _lead(self, action: Callable[[], None]) -> Exception | None:
        """What is for rank 0 to do, while the others wait; its error is that of all."""
        try:
            if self.comm.rank == 0:
                action()
        except Exception as error:
            return common_failure(error, self.comm)
        return common_failure(None, self.comm)

    def _put(self, records: list[dict[str, Any]]) -> None:
        payloads = {
            name: Payload(*payload)
            for record in records
            for name, payload in record["payloads"].items()
        }
        files = {name: Attached(*file) for name, file in records[0]["files"].items()}
        pieces = [piece for record in records for piece in record["pieces"]]
        leaves = _entries(self.plan, self.parts, pieces)
        for name, payload in payloads.items():
            if self.disk.size(self.path / name) != payload.size:
                raise FileNotFoundError(
                    f"{self.path / name} was written by another rank, but is not there for rank 0: "
                    "all ranks have to save to one file system"
                )
        about = self.step, _code(), self.metadata, self.block
        put_manifest(self.path, Manifest(*about, files, payloads, leaves), self.disk)

    def _discard(self) -> None:
        sweep(self.path, self.disk)
        if self.disk.names(self.path) == []:
            self.disk.remove_directory(self.path)


def _checked(state: State, plan: Plan, comm: Comm, extras: Extras) -> tuple[list[Part], str]:
    """This rank's parts, and a text of all that must not differ between ranks."""
    try:
        metadata = json.dumps(extras.metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata is written as JSON, which cannot say it: {error}") from None
    if json.dumps(json.loads(metadata)) != metadata:  # keys 1 and "1", say: one of them would go
        raise TypeError("metadata has two keys of one dict that are the same in JSON: rename one")
    for name in extras.files:
        if not name or name != Path(name).name or len(name.encode()) > NAME_BYTES:
            raise ValueError(f"files[{name!r}]: a plain file name is needed, without directories")
    parts = parts_of(state, plan, comm)
    leaves = [f"{leaf}: {leaf.dtype}, label {leaf.label!r}" for leaf in plan.leaves]
    moments = [f"{label}: moments {sorted(its)}" for label, its in state.opt.items()]
    return parts, "\n".join([metadata, *leaves, *moments])


def _content(name: str, given: Content) -> bytes:
    if isinstance(given, bytes):
        return given
    if isinstance(given, str | Path):
        return Path(given).read_bytes()
    raise TypeError(f"files[{name!r}] is {type(given).__name__}: a path or bytes are needed")


def _code() -> str:
    try:
        ours = version("functional-ep")
    except PackageNotFoundError:
        ours = "not installed"
    return f"functional-ep {ours}, torch {torch.__version__}"


def _entries(
    plan: Plan, parts: Sequence[Part], pieces: Sequence[tuple[int, str, Any]]
) -> tuple[Entry, ...]:
    """Every leaf with the pieces that the ranks have written; each has a part of each tensor."""
    found = {(part.leaf, part.role): (part.x.dtype, list[Piece]()) for part in parts}
    for leaf, role, (lo, hi, file, digests) in pieces:
        found[leaf, role][1].append(Piece(lo, hi, file, tuple(digests)))
    tensors: list[dict[str, Stored]] = [{} for _ in plan.leaves]
    for (i, role), (dtype, its) in found.items():
        tensors[i][role] = Stored(dtype, tuple(sorted(its)))
        leaf = plan.leaves[i]
        refuse_gaps(f"{role} of {leaf}", math.prod(leaf.shape), tensors[i][role].pieces)
    return tuple(
        Entry(leaf.path, leaf.label, leaf.shape, leaf.label in plan.frozen, its)
        for leaf, its in zip(plan.leaves, tensors, strict=True)
    )
