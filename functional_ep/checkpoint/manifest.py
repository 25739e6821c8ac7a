"""The manifest: what a checkpoint holds, where, with the digest of every block. JSON, no topology.

A leaf is a path, a label, a shape, and tensors: the parameter and its moments, which all have that
shape. A tensor is cut into pieces, intervals of the ravelled leaf, wherever whoever wrote them had
them; who reads asks only for intervals.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_ep.safetensors_file import DTYPES, NAMES
from functional_ep.sealed import ALGORITHM, Kind, seal, unseal

MANIFEST = "manifest.json"
KIND = Kind("functional-ep checkpoint", 1, "Restore another checkpoint")
PARAMS = "params"  # the role of the parameter among the tensors of a leaf
STORED = re.compile(r"((rank|frozen)-\d{5,}-[0-9a-f]{32}\.safetensors|file-[0-9a-f]{32}-[^/]+)")


class Piece(NamedTuple):
    """``ravel(leaf)[lo:hi]``, in a file of the checkpoint; a digest for each of its blocks."""

    lo: int
    hi: int
    file: str
    digests: tuple[str, ...]


class Stored(NamedTuple):
    """A tensor of a leaf, in pieces that tile it."""

    dtype: torch.dtype
    pieces: tuple[Piece, ...]


class Entry(NamedTuple):
    """A leaf. ``tensors`` has the parameter under ``params``, and moments under their names."""

    path: str
    label: str
    shape: tuple[int, ...]
    frozen: bool
    tensors: dict[str, Stored]


class Payload(NamedTuple):
    """A file of tensors: its bytes, and length and digest of its header."""

    size: int
    header: int
    digest: str


class Attached(NamedTuple):
    """A file of the user's: the name it is stored under, its bytes and their digest."""

    stored: str
    size: int
    digest: str


class Manifest(NamedTuple):
    """Everything that is known of a checkpoint without reading a number."""

    step: int
    code: str
    metadata: Any
    block: int
    files: dict[str, Attached]
    payloads: dict[str, Payload]
    leaves: tuple[Entry, ...]

    @property
    def names(self) -> set[str]:
        """The files that belong to the checkpoint, beside the manifest."""
        return set(self.payloads) | {file.stored for file in self.files.values()}


def tensor_name(role: str, path: str, lo: int, hi: int) -> str:
    """The name of a piece in its safetensors file.

    >>> tensor_name("params", "blocks/0/w", 0, 12)
    'params/blocks/0/w[0:12]'
    """
    return f"{role}/{path}[{lo}:{hi}]"


def to_bytes(manifest: Manifest) -> bytes:
    """The one text of a manifest, which ends in the digest of all that is before it."""
    numbers = {name: number for number, name in enumerate(manifest.payloads)}
    body: dict[str, Any] = {"format": KIND.format, "version": KIND.version, "digests": ALGORITHM}
    body |= manifest._asdict()
    body["leaves"] = [
        {
            **entry._asdict(),
            "tensors": {
                role: {
                    "dtype": NAMES[stored.dtype],
                    "pieces": [[p.lo, p.hi, numbers[p.file], p.digests] for p in stored.pieces],
                }
                for role, stored in entry.tensors.items()
            },
        }
        for entry in manifest.leaves
    ]
    return seal(body)


def from_bytes(text: bytes, where: Path) -> Manifest:
    """The manifest of a text, if it is just what :func:`to_bytes` made.

    Raises:
        Newer: a format that this code does not know yet.
        Damaged: any other text, of which a bit may have flipped; contents that contradict.
    """
    return unseal(text, where, KIND, _parsed)


def _parsed(body: dict[str, Any]) -> Manifest:
    _need(body["digests"] == ALGORITHM, f"digests are {body['digests']}")
    payloads = {
        name: Payload(_count(size), _count(header), str(seal))
        for name, (size, header, seal) in body["payloads"].items()
    }
    files = {
        name: Attached(str(stored), _count(size), str(seal))
        for name, (stored, size, seal) in body["files"].items()
    }
    for payload in payloads.values():
        _need(8 < payload.header <= payload.size, "a header is longer than its file")
    names = list(payloads)
    for name in [*names, *(file.stored for file in files.values())]:
        _need(STORED.fullmatch(name), f"{name!r} is no file of a checkpoint")
    block = _count(body["block"])
    _need(block > 0 and block % 16 == 0, f"blocks of {block} bytes")
    leaves = tuple(_entry(entry, names, block) for entry in body["leaves"])
    _need(len({entry.path for entry in leaves}) == len(leaves), "two leaves have one path")
    step, code = int(body["step"]), str(body["code"])
    return Manifest(step, code, body["metadata"], block, files, payloads, leaves)


def _entry(entry: dict[str, Any], names: list[str], block: int) -> Entry:
    path, shape = str(entry["path"]), tuple(map(_count, entry["shape"]))
    tensors: dict[str, Stored] = {}
    for role, stored in entry["tensors"].items():
        dtype, pieces = DTYPES[stored["dtype"]], list[Piece]()
        for lo, hi, number, digests in stored["pieces"]:
            lo, hi, number = map(_count, (lo, hi, number))
            blocks = -((lo - hi) * dtype.itemsize // block)
            _need(len(digests) == blocks, f"{role} of {path}: digests of {blocks} blocks expected")
            pieces.append(Piece(lo, hi, names[number], tuple(map(str, digests))))
        tensors[role] = Stored(dtype, tuple(pieces))
        refuse_gaps(f"{role} of {path}", math.prod(shape), tensors[role].pieces)
    _need(PARAMS in tensors, f"{path} has no parameter")
    return Entry(path, str(entry["label"]), shape, bool(entry["frozen"]), tensors)


def refuse_gaps(what: str, size: int, pieces: tuple[Piece, ...]) -> None:
    """Pieces tile the leaf, each entry once."""
    end = 0
    for piece in pieces:
        _need(
            piece.lo == end < piece.hi, f"{what}: entries from {end} on are in no file, or in two"
        )
        end = piece.hi
    _need(end == size, f"{what}: pieces hold {end} entries of {size}")


def _count(number: Any) -> int:
    _need(type(number) is int and number >= 0, f"{number!r} is no count")
    return number


def _need(holds: object, found: str) -> None:
    if not holds:
        raise ValueError(found)
