"""Safetensors files: a JSON header, then numbers. Read and written piece by piece, never mapped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_ep.box import Box

# In the order in which the format's own writer sorts them, from the last to the first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**24  # bytes that are read or written at a time


class Stored(NamedTuple):
    """A tensor in a file: what the header says of it. ``start`` counts bytes of the file."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for what torch has no dtype for."""
        return DTYPES.get(self.kind)

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.kind} in {self.path}"

    def fill(self, out: Tensor, box: Box) -> None:
        """``out = x[box]``, reading from the first to the last number of the box."""
        assert self.dtype is not None
        strides = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        if not out.numel():
            return
        lo = sum(a * stride for (a, _), stride in zip(box, strides, strict=True))
        hi = sum((b - 1) * stride for (_, b), stride in zip(box, strides, strict=True)) + 1
        if hi - lo == out.numel() and out.is_contiguous():
            flat, step = out.view(-1), PIECE // self.dtype.itemsize
            for at in range(0, hi - lo, step):
                self._copy(flat[at : at + step], lo + at)
        else:
            hull = torch.empty(hi - lo, dtype=self.dtype)
            self._copy(hull, lo)
            out.copy_(hull.as_strided(out.shape, strides))

    def _copy(self, out: Tensor, lo: int) -> None:
        assert self.dtype is not None
        same = out.dtype == self.dtype and out.device.type == "cpu"
        numbers = out if same else torch.empty(out.shape, dtype=self.dtype)
        found = read_into(self.path, self.start + lo * self.dtype.itemsize, numbers)
        if found < numbers.numel() * self.dtype.itemsize:
            raise ValueError(f"{self}: the file ended while it was read: it has been cut since")
        if not same:
            out.copy_(numbers)


def read_into(path: Path, start: int, out: Tensor) -> int:
    """Fill a contiguous tensor with the bytes from ``start``; the number of bytes there were."""
    memory, found = memory_of(out), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while found < len(memory):
            count = file.readinto(memory[found:])
            if not count:
                break
            found += count
    return found


def write_from(path: Path, start: int, x: Tensor) -> None:
    """Write a contiguous tensor over the bytes from ``start`` of a file that exists."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(start)
        memory = memory_of(x)
        while memory:
            memory = memory[file.write(memory) :]


def memory_of(x: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on CPU, which they share."""
    bytes_of: Any = x.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(bytes_of)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name.

    Raises:
        ValueError: a file that is no safetensors file, or ends before its last tensor does.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = file.read(8)
        if size < 8 or int.from_bytes(length, "little") > size - 8:
            raise ValueError(
                f"{path} is truncated, or no safetensors file: it has {size} bytes and announces a "
                f"header of {int.from_bytes(length, 'little')}. Copy or download it again"
            )
        text = file.read(int.from_bytes(length, "little"))
    return parse_header(path, text, size)


def parse_header(path: Path, text: bytes, size: int) -> dict[str, Stored]:
    """The same from the JSON of the header, which is all that has been read of the file."""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        found = {
            name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no safetensors file: its header cannot be read ({error}). "
            "Copy or download it again"
        ) from None
    first = 8 + len(text)
    return {
        name: _checked(path, size, name, kind, shape, first + start, first + end)
        for name, (kind, shape, start, end) in found.items()
    }


def _checked(
    path: Path, size: int, name: str, kind: str, shape: tuple[int, ...], start: int, end: int
) -> Stored:
    stored = Stored(path, name, kind, shape, start)
    if end > size:
        raise ValueError(
            f"{path} is truncated: {name} ends at byte {end}, and the file has {size} bytes. "
            "Copy or download it again"
        )
    if stored.dtype is not None and math.prod(shape) * stored.dtype.itemsize != end - start:
        raise ValueError(f"{path} is damaged: {stored} cannot have {end - start} bytes")
    return stored


def make_header(path: Path, tensors: Mapping[str, Tensor]) -> tuple[bytes, list[Stored], int]:
    """The header of a file of these tensors, where each one goes, and the bytes of the file.

    Byte for byte what the safetensors library writes.
    """
    order = list(DTYPES)
    by_dtype = sorted(
        tensors.items(), key=lambda item: (-order.index(NAMES[item[1].dtype]), item[0])
    )
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in by_dtype:
        start, end = end, end + x.numel() * x.dtype.itemsize
        entries[name] = {
            "dtype": NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    stored = [
        Stored(path, name, entry["dtype"], tuple(entry["shape"]), first + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    ]
    return len(text).to_bytes(8, "little") + text, stored, first + end
