"""Reader: any interval of a checkpoint's tensors, compared with the manifest as it is read."""

from __future__ import annotations

import threading
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_ep.checkpoint.digest import digest_of_all
from functional_ep.checkpoint.disk import Disk, read_all
from functional_ep.checkpoint.manifest import PARAMS, Entry, Manifest, Piece, tensor_name
from functional_ep.safetensors_file import NAMES, memory_of, parse_header
from functional_ep.safetensors_file import Stored as InFile
from functional_ep.sealed import Damaged, digest
from sharding.tree import show

AGAIN = "Restore another checkpoint"


class Wanted(NamedTuple):
    """A tensor of a leaf that is being read, for words that say which."""

    entry: Entry
    role: str

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.tensors[self.role].dtype

    def __str__(self) -> str:
        where = show(self.entry.path)
        return where if self.role == PARAMS else f"moment {self.role!r} of {where}"


class Reader:
    """Reads blocks: what is wanted of a block costs reading all of it, and memory for one.

    Several threads may read at a time. Whatever is not as the manifest says raises ``Damaged``.
    """

    def __init__(self, path: Path, manifest: Manifest, disk: Disk, *, verify: bool) -> None:
        self.path, self.manifest, self.verify, self.disk = path, manifest, verify, disk
        self.headers: dict[str, dict[str, InFile]] = {}
        self.memory = threading.local()

    def fill(self, wanted: Wanted, lo: int, out: Tensor) -> None:
        """``out = ravel(x)[lo : lo + len(out)]``, in the dtype and on the device of ``out``."""
        pieces, hi = wanted.entry.tensors[wanted.role].pieces, lo + out.numel()
        first = bisect_right(pieces, lo, key=lambda piece: piece.lo) - 1
        for piece in pieces[max(first, 0) :]:
            if piece.lo >= hi:
                break
            start, stop = max(lo, piece.lo), min(hi, piece.hi)
            self._read(wanted, piece, start - piece.lo, out[start - lo : stop - lo])

    def check(self, wanted: Wanted, piece: Piece) -> None:
        """Read a whole piece, for its errors only."""
        place, step = self._place(wanted, piece), self.manifest.block // wanted.dtype.itemsize
        for first in range(0, piece.hi - piece.lo, step):
            count = min(step, piece.hi - piece.lo - first)
            block = self._staged(wanted.dtype, count)
            self._block(wanted, piece, place, first, block)

    def _staged(self, dtype: torch.dtype, count: int) -> Tensor:
        """Memory for a block, one of each thread."""
        if not hasattr(self.memory, "block"):
            self.memory.block = torch.empty(self.manifest.block, dtype=torch.uint8)
        return self.memory.block[: count * dtype.itemsize].view(dtype)

    def _read(self, wanted: Wanted, piece: Piece, start: int, out: Tensor) -> None:
        """Entries of a piece from ``start`` on, block by block."""
        place = self._place(wanted, piece)
        dtype, size, stop = wanted.dtype, piece.hi - piece.lo, start + out.numel()
        step = self.manifest.block // dtype.itemsize
        for first in range(start // step * step, stop, step):
            last = min(first + step, size)
            lo, hi = max(start, first), min(stop, last)
            target = out[lo - start : hi - start]
            direct = (lo, hi) == (first, last) and target.dtype == dtype and not target.is_cuda
            block = target if direct else self._staged(dtype, last - first)
            self._block(wanted, piece, place, first, block)
            if not direct:
                target.copy_(block[lo - first : hi - first])

    def _block(
        self, wanted: Wanted, piece: Piece, place: InFile, first: int, block: Tensor
    ) -> None:
        memory, at = memory_of(block), place.start + first * block.element_size()
        slices = self.disk.read(self.path / piece.file, at, memory)
        number = first * block.element_size() // self.manifest.block
        if self.verify:
            seal, found = digest_of_all(slices)
        else:
            seal, found = piece.digests[number], sum(map(len, slices))
        if found < len(memory):
            raise Damaged(f"{self._names(wanted, piece)} ends too early. {AGAIN}")
        if seal != piece.digests[number]:
            raise Damaged(
                f"{self._names(wanted, piece)} is damaged: the digest of bytes {at} to "
                f"{at + len(memory)} is not that of the manifest. {AGAIN}"
            )

    def _names(self, wanted: Wanted, piece: Piece) -> str:
        return f"{wanted} [{piece.lo}:{piece.hi}] in {self.path / piece.file}"

    def _place(self, wanted: Wanted, piece: Piece) -> InFile:
        """Where the piece is in its file, which is looked at when it is first needed."""
        if piece.file not in self.headers:
            self.headers[piece.file] = self._header(wanted, piece.file)
        name = tensor_name(wanted.role, wanted.entry.path, piece.lo, piece.hi)
        place = self.headers[piece.file].get(name)
        kind = NAMES[wanted.dtype]
        if place is None or (place.kind, place.shape) != (kind, (piece.hi - piece.lo,)):
            raise Damaged(f"{self.path / piece.file} has no {name} as in the manifest. {AGAIN}")
        return place

    def _header(self, wanted: Wanted, file: str) -> dict[str, InFile]:
        path, payload = self.path / file, self.manifest.payloads[file]
        size = self.disk.size(path)
        if size is None:
            raise Damaged(f"{path} is missing, {wanted} is in it. {AGAIN}")
        if size != payload.size:
            raise Damaged(
                f"{path} has {size} bytes and should have {payload.size}: it is truncated, or of "
                f"another run; {wanted} is in it. {AGAIN}"
            )
        head = bytearray(payload.header)
        seal, _ = digest_of_all(self.disk.read(path, 0, memoryview(head)))
        announced = 8 + int.from_bytes(head[:8], "little")
        if announced != len(head) or (self.verify and seal != payload.digest):
            raise Damaged(
                f"{path} has another header than the manifest says: it is damaged, or of another "
                f"run; {wanted} is in it. {AGAIN}"
            )
        try:
            return parse_header(path, bytes(head[8:]), size)
        except ValueError:  # nobody has looked at its digest
            raise Damaged(
                f"{path} has a header that cannot be read; {wanted} is in it. {AGAIN}"
            ) from None

    def attached(self, name: str) -> bytes:
        """The bytes of a file of the user's."""
        file = self.manifest.files[name]
        content = read_all(self.path / file.stored, self.disk)
        if content is None:
            raise Damaged(f"{self.path / file.stored}, {name}, is missing. {AGAIN}")
        if len(content) != file.size or (self.verify and digest(content) != file.digest):
            raise Damaged(f"{self.path / file.stored}, {name}, is damaged. {AGAIN}")
        return content
