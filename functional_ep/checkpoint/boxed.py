"""Boxed: the files of torch.distributed.checkpoint, read without running what is in them."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from functional_ep.box import boxes, sizes_of, slices_of
from functional_ep.checkpoint.disk import DISK, read_all, write_all
from functional_ep.safetensors_file import DTYPES
from sharding.leaf import Leaf

STEP = "step"  # the name of the clock
FORMAT = "torch.distributed.checkpoint."
ADMITTED = {
    FORMAT + "metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    FORMAT + "filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    """Lets in what a table of contents is made of, and nothing that does something."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"pathlib._local": "pathlib"}.get(module, module)  # as Python 3.13 writes it
        if name in ADMITTED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise ValueError(f"it asks for {module}.{name}, which is no part of a table of contents")


def read_metadata(path: Path) -> Metadata:
    """The table of contents.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or wants to be more than that.
    """
    text = read_all(path, DISK)
    if text is None:
        raise FileNotFoundError(
            f"{path.parent} is no directory of torch.distributed.checkpoint: it has no {path.name}"
        )
    try:
        found = _Unpickler(io.BytesIO(text)).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"it is {type(found).__name__}")
    except Exception as error:  # an unpickler may raise anything
        raise ValueError(f"{path} cannot be read as a table of contents: {error}") from None
    return found


def save_box(stream: IO[bytes], x: Tensor) -> tuple[int, int]:
    """Append a tensor as that format does; where it begins, and how many bytes it has."""
    start = stream.tell()
    torch.save(x.clone(), stream)
    return start, stream.tell() - start


def make_metadata(records: list[dict[str, Any]], folder: Path, step: int) -> Metadata:
    """The table of contents, with the step as a tensor that rank 0 adds in a file of its own."""
    stream = io.BytesIO()
    place = save_box(stream, torch.tensor(step))
    write_all(folder / "__step.distcp", [stream.getbuffer()], DISK)
    shapes: dict[str, Any] = {STEP: ((), "I64")} | records[0]["shapes"]
    entries: list[Any] = [(STEP, (), "__step.distcp", *place)]
    entries += [entry for record in records for entry in record["entries"]]
    tensors = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=DTYPES[kind]), torch.Size(shape), list[ChunkStorageMetadata]()
        )
        for name, (shape, kind) in shapes.items()
    }
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for name, box, file, at, length in entries:
        offsets = torch.Size(lo for lo, _ in box)
        index = MetadataIndex(name, offsets, len(tensors[name].chunks))
        tensors[name].chunks.append(ChunkStorageMetadata(offsets, torch.Size(sizes_of(box))))
        stored[index] = _StorageInfo(file, at, length)
    table: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {**tensors}
    return Metadata(table, planner_data={name: (name,) for name in table}, storage_data=stored)


class Wanted(NamedTuple):
    """A tensor that is looked for: of which role and leaf, and under which name."""

    role: str
    leaf: Leaf
    name: str

    def __str__(self) -> str:
        return f"{self.role} of {self.leaf}"


class Boxed:
    """The tensors of a directory, of which intervals can be read."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path, self.metadata = path, metadata

    def fill(self, wanted: Wanted, lo: int, out: Tensor) -> None:
        """``out = ravel(x)[lo : lo + len(out)]``, chunk by chunk."""
        name, found = wanted.name, self._found(wanted)
        targets, start = list[tuple[Any, Tensor]](), 0
        for box in boxes(lo, lo + out.numel(), wanted.leaf.shape):
            size = math.prod(sizes_of(box))
            targets.append((box, out[start : start + size].view(sizes_of(box))))
            start += size
        filled = 0
        for i, chunk in enumerate(found.chunks):
            ends = zip(chunk.offsets, chunk.sizes, strict=True)
            held, x = tuple((at, at + size) for at, size in ends), None
            for box, target in targets:
                pairs = zip(box, held, strict=True)
                common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in pairs)
                if any(a >= b for a, b in common):
                    continue
                x = self._chunk(name, chunk.offsets, i, chunk.sizes) if x is None else x
                into, from_ = (
                    tuple((a - o, b - o) for (a, b), (o, _) in zip(common, origin, strict=True))
                    for origin in (box, held)
                )
                target[slices_of(into)] = x[slices_of(from_)]
                filled += math.prod(sizes_of(common))
        if filled != out.numel():
            raise ValueError(
                f"{wanted}: the chunks of {name!r} in {self.path} hold {filled} of the "
                f"{out.numel()} entries from {lo} on"
            )

    def dtype(self, wanted: Wanted) -> torch.dtype:
        """What it was saved as."""
        return self._found(wanted).properties.dtype

    def _found(self, wanted: Wanted) -> TensorStorageMetadata:
        name, shape = wanted.name, wanted.leaf.shape
        found = self.metadata.state_dict_metadata.get(name)
        if not isinstance(found, TensorStorageMetadata):
            near = list(self.metadata.state_dict_metadata)[:5]
            raise ValueError(f"{wanted}: {self.path} has no tensor {name!r}; it has {near} ...")
        if tuple(found.size) != shape:
            raise ValueError(
                f"{wanted} expected, but {name!r} in {self.path} is {tuple(found.size)}"
            )
        return found

    def _chunk(self, name: str, offsets: Any, number: int, sizes: Any) -> Tensor:
        x = self._load(MetadataIndex(name, offsets, number))
        if not isinstance(x, Tensor) or x.shape != sizes:
            raise ValueError(f"{name!r} in {self.path} is no chunk of {tuple(sizes)}")
        return x

    def _load(self, index: MetadataIndex) -> Any:
        info = (self.metadata.storage_data or {}).get(index)
        if info is None or getattr(info, "transform_descriptors", None):
            raise ValueError(f"{index.fqn!r} in {self.path} is nowhere, or compressed")
        file, memory = self.path / info.relative_path, bytearray(info.length)
        if file.parent != self.path:
            raise ValueError(f"{index.fqn!r} is said to be in {file}, outside of {self.path}")
        found = sum(map(len, DISK.read(file, info.offset, memoryview(memory))))
        if found < len(memory):
            raise ValueError(f"{file} is truncated: {index.fqn!r} is in it")
        try:
            return torch.load(io.BytesIO(memory), map_location="cpu", weights_only=True)
        except Exception as error:  # an unpickler may raise anything
            raise ValueError(f"{index.fqn!r} in {file} cannot be read: {error}") from None

    def step(self) -> int:
        """The clock, a tensor or a number; 0 where there is none."""
        found = self.metadata.state_dict_metadata.get(STEP)
        if found is None:
            return 0
        tensor = isinstance(found, TensorStorageMetadata)
        chunk = found.chunks[0].offsets if tensor else None
        return int(self._load(MetadataIndex(STEP, chunk, 0 if tensor else None)))
