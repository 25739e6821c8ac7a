"""Folder: what a directory is to us; how a manifest gets its name there, and what nobody names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from functional_ep.checkpoint.disk import DISK, Disk, read_all, write_all
from functional_ep.checkpoint.manifest import MANIFEST, STORED, Manifest, from_bytes, to_bytes
from functional_ep.sealed import Newer

INCOMPLETE = ".incomplete"
STEP = re.compile(r"step-(\d{8,})")
OURS = re.compile(
    rf"{STORED.pattern}|{re.escape(MANIFEST)}"
    rf"|\.(rank|frozen|file|manifest)[^/]*{re.escape(INCOMPLETE)}"
)


def growing(path: Path) -> Path:
    """The name of a file that is not whole yet."""
    return path.with_name(f".{path.name}{INCOMPLETE}")


def read_manifest(path: Path, disk: Disk) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        FileNotFoundError: no checkpoint; says what else it seems to be, and what to do.
        Damaged, Newer: a manifest that is damaged, or of a newer format.
    """
    text = read_all(path / MANIFEST, disk)
    if text is None:
        raise FileNotFoundError(f"{path} is no checkpoint: {_instead(path, disk)}")
    return from_bytes(text, path / MANIFEST)


def _instead(path: Path, disk: Disk) -> str:
    names = disk.names(path)
    if names is None:
        is_file = disk.size(path) is not None
        return "it is a file" if is_file else "there is no such directory"
    steps = [name for name in names if STEP.fullmatch(name) and disk.size(path / name / MANIFEST)]
    if steps:
        return f"it holds {len(steps)} of them, the newest is {path / steps[-1]}"
    if ".metadata" in names:
        return "torch.distributed.checkpoint wrote it: functional_ep.checkpoint.dcp reads that"
    if "config.json" in names:
        return "it is a Hugging Face model: read it with from_huggingface(path).load(plan, comm)"
    if any(OURS.fullmatch(name) for name in names):
        return "a save to it ended before it was complete. Restore an earlier one"
    return f"it has no {MANIFEST}"


@contextmanager
def claimed(path: Path, disk: Disk) -> Iterator[None]:
    """Meanwhile no other process saves to a directory, nor removes what is not named there yet.

    It ends with the process, however that ends, and where nobody refers to it any more.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        lock = disk.lock(path)
    except BlockingIOError:
        raise BlockingIOError(
            f"another process is saving to {path}: wait for it, or choose another path"
        ) from None
    try:
        yield
    finally:
        disk.unlock(lock)


def put_manifest(path: Path, manifest: Manifest, disk: Disk) -> None:
    """The moment of a save: the renaming. What the old manifest named may go after it, not before.

    Payloads and their names have reached the medium by now, and the new name has, before anything
    is removed; so after a crash either manifest finds all that it names.

    Raises:
        OSError: it is not there; or it is, but that may not survive a crash, which the error says.
    """
    write_all(growing(path / MANIFEST), [memoryview(to_bytes(manifest))], disk)
    disk.rename(growing(path / MANIFEST), path / MANIFEST)
    try:
        disk.sync_directory(path)
    except OSError as error:
        error.strerror = f"{error.strerror}, so what was saved may not survive a crash"
        error.filename = error.filename or str(path)
        raise
    with suppress(OSError):  # saved it is, whatever else is left there; the next save sweeps again
        _remove_unnamed(path, disk)


def sweep(path: Path, disk: Disk) -> None:
    """Remove what saves left behind: files of ours that the manifest, if there is one, lacks."""
    disk.sync_directory(path)
    _remove_unnamed(path, disk)


def _remove_unnamed(path: Path, disk: Disk) -> None:
    try:
        kept = read_manifest(path, disk).names | {MANIFEST}
    except (FileNotFoundError, ValueError):
        kept = {MANIFEST}
    for name in disk.names(path) or ():
        if OURS.fullmatch(name) and name not in kept:
            disk.remove(path / name)


def refuse_foreign(path: Path, disk: Disk) -> None:
    """Save over nothing that is not a checkpoint, and over none from the future."""
    names = disk.names(path)
    if names is None and disk.size(path) is not None:
        raise FileExistsError(f"{path} is a file: a checkpoint is a directory, choose another path")
    foreign = [name for name in names or () if not OURS.fullmatch(name)]
    try:
        read_manifest(path, disk)
    except Newer:
        raise
    except (FileNotFoundError, ValueError):
        # Nothing, or what is left of a checkpoint: it has files of ours beside its manifest.
        ours = [name for name in names or () if STORED.fullmatch(name)]
        if MANIFEST in (names or ()):
            foreign = [] if ours else [*foreign, MANIFEST]
        if foreign:
            raise FileExistsError(
                f"{path} exists and is no checkpoint, it holds {foreign[0]}: choose another path"
            ) from None


def committed(directory: str | Path, disk: Disk = DISK) -> list[Path]:
    """The checkpoints ``step-...`` of a directory, the oldest first; a save under way is none."""
    directory = Path(directory)
    names = [name for name in disk.names(directory) or () if STEP.fullmatch(name)]
    paths = sorted((directory / name for name in names), key=step_of)
    return [path for path in paths if disk.size(path / MANIFEST) is not None]


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def tidy(directory: Path, disk: Disk) -> None:
    """Remove what crashed saves, and removals, left of checkpoints that are none.

    What another process is saving is none either, but is left alone.
    """
    whole = committed(directory, disk)
    for name in disk.names(directory) or ():
        if STEP.fullmatch(name) and directory / name not in whole:
            with suppress(BlockingIOError), claimed(directory / name, disk):
                _empty(directory / name, disk)


def discard(path: Path, disk: Disk) -> None:
    """Remove a checkpoint: first what makes it one, so that half of it never looks like one.

    Raises:
        BlockingIOError: another process is saving to it.
    """
    with claimed(path, disk):
        disk.remove(path / MANIFEST)
        _empty(path, disk)


def _empty(path: Path, disk: Disk) -> None:
    """Remove our files, now that no manifest names them, and the directory if it is empty then."""
    sweep(path, disk)
    if disk.names(path) == []:
        disk.remove_directory(path)
        disk.sync_directory(path.parent)
