"""Payloads: the files of one rank, named by what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from functional_ep.checkpoint.digest import digest, digests_of
from functional_ep.checkpoint.disk import Disk, write_all
from functional_ep.checkpoint.folder import growing
from functional_ep.checkpoint.manifest import Attached, Payload, Piece
from functional_ep.checkpoint.parts import Part
from functional_ep.safetensors_file import make_header, memory_of


class Written(NamedTuple):
    """What a rank has written: its files, and its pieces by leaf and role."""

    payloads: dict[str, Payload]
    pieces: list[tuple[int, str, Piece]]


def write_payloads(
    folder: Path, parts: Sequence[Part], rank: int, block: int, earlier: Path | None, disk: Disk
) -> Written:
    """Write this rank's parts, the frozen ones to a file of their own: those do not change.

    A file that ``earlier``, another checkpoint, has is linked instead. Every file comes into being
    under its name at once, and whole.
    """
    written = Written({}, [])
    for stem, frozen in (("frozen", True), ("rank", False)):
        mine = [part for part in parts if part.frozen == frozen and part.lo < part.hi]
        if mine:
            _write(folder, f"{stem}-{rank:05}", mine, block, earlier, disk, written)
    disk.sync_directory(folder)
    return written


def _write(
    folder: Path,
    stem: str,
    parts: Sequence[Part],
    block: int,
    earlier: Path | None,
    disk: Disk,
    written: Written,
) -> None:
    by_name = {part.name: part for part in parts}
    header, places, size = make_header(folder, {name: p.x for name, p in by_name.items()})
    digests = {place.name: digests_of(by_name[place.name].x, block) for place in places}
    content = digest(header + "".join(d for each in digests.values() for d in each).encode())
    name = f"{stem}-{content}.safetensors"
    memories = [memory_of(by_name[place.name].x) for place in places]
    _put(folder, name, size, [memoryview(header), *memories], earlier, disk)
    written.payloads[name] = Payload(size, len(header), digest(header))
    for place in places:
        part = by_name[place.name]
        piece = Piece(part.lo, part.hi, name, digests[place.name])
        written.pieces.append((part.leaf, part.role, piece))


def write_attached(
    folder: Path, files: dict[str, bytes], earlier: Path | None, disk: Disk
) -> dict[str, Attached]:
    """Write the user's files."""
    written: dict[str, Attached] = {}
    for name, content in files.items():
        stored = f"file-{digest(content)}-{name}"
        _put(folder, stored, len(content), [memoryview(content)], earlier, disk)
        written[name] = Attached(stored, len(content), digest(content))
    return written


def _put(
    folder: Path,
    name: str,
    size: int,
    memories: list[memoryview],
    earlier: Path | None,
    disk: Disk,
) -> None:
    temporary = growing(folder / name)
    if not (earlier and _linked(earlier / name, size, temporary, disk)):
        write_all(temporary, memories, disk)
    disk.rename(temporary, folder / name)


def _linked(old: Path, size: int, new: Path, disk: Disk) -> bool:
    """Whether the bytes could get a second name; not all file systems can give one."""
    if disk.size(old) != size:
        return False
    try:
        disk.link(old, new)
    except OSError:
        return False
    return True
