"""Payloads: the files of one rank, named by what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from functional_ep.checkpoint.digest import digests_of
from functional_ep.checkpoint.disk import Disk, write_all
from functional_ep.checkpoint.folder import growing
from functional_ep.checkpoint.manifest import Attached, Payload, Piece
from functional_ep.checkpoint.parts import Part
from functional_ep.safetensors_file import make_header, memory_of
from functional_ep.sealed import digest


class Written(NamedTuple):
    """What a rank has written: its files, and its pieces by leaf and role."""

    payloads: dict[str, Payload]
    pieces: list[tuple[int, str, Piece]]


def write_payloads(
    folder: Path, parts: Sequence[Part], rank: int, *, block: int, earlier: Path | None, disk: Disk
) -> Written:
    """Write this rank's parts, the frozen ones to a file of their own: those do not change.

    A file that ``earlier``, another checkpoint, has is linked instead. Every file comes into being
    under its name at once, and whole.
    """
    written = Written({}, [])
    for stem, frozen in (("frozen", True), ("rank", False)):
        mine = [part for part in parts if part.frozen == frozen and part.lo < part.hi]
        if mine:
            name = f"{stem}-{rank:05}"
            its = _write(folder, name, mine, block=block, earlier=earlier, disk=disk)
            written.payloads.update(its.payloads)
            written.pieces.extend(its.pieces)
    disk.sync_directory(folder)
    return written


def _write(
    folder: Path,
    stem: str,
    parts: Sequence[Part],
    *,
    block: int,
    earlier: Path | None,
    disk: Disk,
) -> Written:
    by_name = {part.name: part for part in parts}
    header, places, size = make_header(folder, {name: p.x for name, p in by_name.items()})
    xs = [by_name[place.name].x for place in places]
    temporary = growing(folder / stem)
    with ThreadPoolExecutor(1) as beside:  # digests and writing both leave the interpreter alone
        sealing = beside.submit(lambda: [digests_of(x, block) for x in xs])
        if not (earlier and _linked(earlier / _name(stem, header, sealing), size, temporary, disk)):
            write_all(temporary, [memoryview(header), *map(memory_of, xs)], disk)
        name = _name(stem, header, sealing)
    disk.rename(temporary, folder / name)
    pieces: list[tuple[int, str, Piece]] = []
    for place, digests in zip(places, sealing.result(), strict=True):
        part = by_name[place.name]
        pieces.append((part.leaf, part.role, Piece(part.lo, part.hi, name, digests)))
    return Written({name: Payload(size, len(header), digest(header))}, pieces)


def _name(stem: str, header: bytes, sealing: Future[list[tuple[str, ...]]]) -> str:
    """Of a file with this content; two of one name have the same."""
    seals = "".join(seal for digests in sealing.result() for seal in digests)
    return f"{stem}-{digest(header + seals.encode())}.safetensors"


def write_attached(
    folder: Path, files: dict[str, bytes], earlier: Path | None, disk: Disk
) -> dict[str, Attached]:
    """Write the user's files."""
    written: dict[str, Attached] = {}
    for name, content in files.items():
        stored = f"file-{digest(content)}-{name}"
        temporary = growing(folder / stored)
        if not (earlier and _linked(earlier / stored, len(content), temporary, disk)):
            write_all(temporary, [memoryview(content)], disk)
        disk.rename(temporary, folder / stored)
        written[name] = Attached(stored, len(content), digest(content))
    return written


def _linked(old: Path, size: int, new: Path, disk: Disk) -> bool:
    """Whether the bytes could get a second name; not all file systems can give one."""
    if disk.size(old) != size:
        return False
    try:
        disk.link(old, new)
    except OSError:
        return False
    return True
