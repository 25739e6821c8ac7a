"""Check: what is in a checkpoint, and whether all of it is still what was written. One process."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_ep.checkpoint.disk import DISK, Disk
from functional_ep.checkpoint.folder import read_manifest
from functional_ep.checkpoint.manifest import KIND, PARAMS, Manifest
from functional_ep.checkpoint.reader import Reader, Wanted


class LeafOf(NamedTuple):
    """A leaf of a checkpoint."""

    path: str
    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    frozen: bool
    moments: tuple[str, ...]


class Contents(NamedTuple):
    """What a checkpoint says of itself; ``print`` it for a table. ``problems`` are of verify."""

    path: Path
    step: int
    version: int
    code: str
    metadata: Any
    leaves: tuple[LeafOf, ...]
    files: dict[str, int]
    bytes: int
    problems: tuple[str, ...]

    def __str__(self) -> str:
        entries = sum(math.prod(leaf.shape) for leaf in self.leaves)
        lines = [
            f"{self.path}: step {self.step}, {len(self.leaves)} leaves of {entries:,} entries, "
            f"{self.bytes:,} bytes",
            f"format version {self.version}, written by {self.code}",
        ]
        lines += [f"metadata {self.metadata!r}"] if self.metadata is not None else []
        lines += [f"file {name}, {size:,} bytes" for name, size in self.files.items()]
        rows = [
            (
                leaf.path,
                leaf.label,
                "x".join(map(str, leaf.shape)) or "scalar",
                str(leaf.dtype).removeprefix("torch."),
                "frozen" if leaf.frozen else " ".join(leaf.moments) or "-",
            )
            for leaf in self.leaves
        ]
        rows.insert(0, ("leaf", "label", "shape", "dtype", "moments"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in self.problems)])


def describe(path: str | Path, *, disk: Disk = DISK) -> Contents:
    """What a checkpoint says of itself, in its manifest alone: quick, and no number is read.

    Raises:
        FileNotFoundError, ValueError: as :func:`functional_ep.restore`, of the manifest.

    >>> from tempfile import TemporaryDirectory
    >>> from sharding import Mesh, make_plan, simulate, zero3
    >>> from functional_ep import adamw, init_state, save
    >>> params = {"w": torch.ones(3)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> def program(comm, path):
    ...     save(path, init_state(plan.shard(params, comm), plan, adamw(0.1)), plan, comm)
    >>> with TemporaryDirectory() as path:
    ...     _ = simulate(program, plan.mesh, [path] * 2)
    ...     describe(path).leaves[0].moments
    ('m', 'v')
    """
    path = Path(path)
    return _contents(path, read_manifest(path, disk), ())


def verify(path: str | Path, *, disk: Disk = DISK) -> Contents:
    """The same after every byte has been read and compared; what is wrong is in ``problems``.

    A problem names leaf, piece and file. A damaged manifest, of which nothing can be believed, is
    an error as in :func:`describe`.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from sharding import Mesh, make_plan, replicated, simulate
    >>> from functional_ep import init_state, save, sgd
    >>> params = {"w": torch.ones(3)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": replicated()}, Mesh())
    >>> def program(comm, path):
    ...     save(path, init_state(plan.shard(params, comm), plan, sgd(0.1)), plan, comm)
    >>> with TemporaryDirectory() as path:
    ...     _ = simulate(program, plan.mesh, [path])
    ...     (payload,) = Path(path).glob("rank-*")
    ...     whole = payload.read_bytes()
    ...     _ = payload.write_bytes(whole[:-1] + b"!")
    ...     verify(path).problems[0].split(" in ")[0]
    "params['w'] [0:3]"
    """
    path = Path(path)
    manifest = read_manifest(path, disk)
    return _contents(path, manifest, tuple(_problems(Reader(path, manifest, disk, verify=True))))


def is_whole(path: Path, share: slice, disk: Disk = DISK) -> bool:
    """Whether a share of the bytes, such as ``slice(rank, None, ranks)``, is what was written."""
    try:
        return not _problems(Reader(path, read_manifest(path, disk), disk, verify=True), share)
    except (OSError, ValueError):
        return False


def attached(path: str | Path, name: str, *, disk: Disk = DISK) -> bytes:
    """The bytes of a file that was saved along, ``save(..., files={name: ...})``, verified.

    Raises:
        FileNotFoundError: no such file; those that there are are named.
        ValueError: it is damaged.
    """
    path = Path(path)
    manifest = read_manifest(path, disk)
    if name not in manifest.files:
        raise FileNotFoundError(f"{path} has no file {name!r}: it has {list(manifest.files)}")
    return Reader(path, manifest, disk, verify=True).attached(name)


def _contents(path: Path, manifest: Manifest, problems: tuple[str, ...]) -> Contents:
    leaves = tuple(
        LeafOf(
            entry.path,
            entry.label,
            entry.shape,
            entry.tensors[PARAMS].dtype,
            entry.frozen,
            tuple(name for name in entry.tensors if name != PARAMS),
        )
        for entry in manifest.leaves
    )
    sizes = {name: file.size for name, file in manifest.files.items()}
    total = sum(p.size for p in manifest.payloads.values()) + sum(sizes.values())
    about = manifest.step, KIND.version, manifest.code, manifest.metadata
    return Contents(path, *about, leaves, sizes, total, problems)


def _problems(reader: Reader, share: slice = slice(None)) -> list[str]:
    checks: list[Callable[[], object]] = [
        partial(reader.check, Wanted(entry, role), piece)
        for entry in reader.manifest.leaves
        for role, stored in entry.tensors.items()
        for piece in stored.pieces
    ]
    checks += [partial(reader.attached, name) for name in reader.manifest.files]
    found = Counter[str]()
    for check in checks[share]:
        try:
            check()
        except (OSError, ValueError) as error:
            found[str(error)] += 1
    return list(found)
