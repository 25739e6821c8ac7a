"""Weights out: what ``from_pretrained`` loads, streamed from the shards of all ranks."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_ep.agreement import together
from functional_ep.huggingface.companions import write_companions
from functional_ep.huggingface.files import Files, write_headers
from functional_ep.huggingface.lazy import Lazy, read
from functional_ep.huggingface.lora import adapter_of, adapter_tensors
from functional_ep.huggingface.names import Module, match, to_hub
from functional_ep.huggingface.source import open_source
from functional_ep.huggingface.stream import Described, Gathering, batches_of, cast, leaves_of
from functional_ep.safetensors_file import PIECE, Stored, write_from
from sharding import Comm, Plan


def write(
    path: str | Path,
    shards: Any,
    plan: Plan,
    comm: Comm,
    model: Described,
    max_shard_size: int | str,
    dtype: torch.dtype | None,
) -> None:
    """See :func:`functional_ep.to_huggingface`."""
    path = Path(path)
    together(lambda: _refuse_existing(path), comm)
    held = dict(
        zip((leaf.path for leaf in plan.leaves), plan.check_shards(shards, comm), strict=True)
    )
    module, whole = Module(model.skeleton), dict[str, Tensor]()
    adapter = adapter_of(model.skeleton)
    _refuse_trained_base(plan, adapter)
    leaves = leaves_of(module, plan, model, whole)
    tensors, files = _files(module, model, adapter, leaves, max_shard_size, dtype)
    first = held[next(iter(module.first_name))]  # which has what transformers calls a model's dtype
    growing = path.parent / f".{path.name}.incomplete"

    def prepare() -> None:
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        write_headers(growing, files, module)
        if adapter is None:
            write_companions(growing, module.skeleton, dtype or first.dtype, model.source)
        else:
            module.skeleton.peft_config[adapter].save_pretrained(growing)

    try:
        together(prepare if comm.rank == 0 else _nothing, comm)
        writer, gathering = _Writer(growing, tensors, files, comm), Gathering(held, plan, comm)
        for batch in batches_of(tensors, plan):
            whole.update(gathering.whole(batch.leaves))
            writer.write(batch.tensors)
            whole.clear()
        together(writer.finish, comm)
        together((lambda: _rename(growing, path)) if comm.rank == 0 else _nothing, comm)
    except BaseException:
        if comm.rank == 0:
            shutil.rmtree(growing, ignore_errors=True)
        raise


def _refuse_trained_base(plan: Plan, adapter: str | None) -> None:
    for leaf in plan.leaves if adapter else ():
        if leaf.label in plan.trained and ".lora_" not in leaf.path:
            raise ValueError(
                f"{leaf} is trained, but only the adapter would be written: freeze the base, with "
                "train_only(model.labels, rules, '*.lora_*')"
            )


def _files(
    module: Module,
    model: Described,
    adapter: str | None,
    leaves: dict[str, Lazy],
    size: int | str,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Lazy], Files]:
    """What is written, and the files that it is in."""
    if adapter is None:
        tensors, stem = to_hub(module, leaves, _used(module, model.source)), "model"
    else:
        tensors, stem, size = adapter_tensors(adapter, leaves), "adapter_model", sys.maxsize
    if dtype is not None:
        tensors = {name: cast(x, dtype) for name, x in tensors.items()}
    return tensors, Files.split(tensors, size, stem)


def _nothing() -> None: ...


def _refuse_existing(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} exists and is no empty directory: choose another path, or move it away"
        )


def _used(module: Module, source: Any) -> list[Any] | None:
    """The conversions that loading uses, and None for those of a model that was not loaded."""
    if isinstance(source, str | Path) and not Path(source).is_dir():
        warnings.warn(
            f"{source} is gone: names are those that transformers gives a new {module}, and there "
            "is no tokenizer to copy",
            stacklevel=3,
        )
        return None
    if isinstance(source, str | Path | Mapping):
        return match(module, open_source(source)).used
    return getattr(source, "_weight_conversions", None)


class _Writer:
    """This rank's part of the writing: block i of a file is rank i's, modulo ranks.

    So no two ranks write into one page of it. After an error nothing more is written, but the rank
    goes on gathering with the others until all hear of it.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Lazy], files: Files, comm: Comm) -> None:
        self.folder, self.tensors, self.files, self.comm = folder, tensors, files, comm
        self.buffer = torch.empty(PIECE, dtype=torch.uint8)
        self.trouble: OSError | None = None

    def write(self, names: list[str]) -> None:
        """Tensors whose leaves are whole."""
        try:
            for name in names if self.trouble is None else ():
                self._write(self.tensors[name], self.files.places[name])
        except OSError as error:
            self.trouble = error

    def _write(self, x: Lazy, stored: Stored) -> None:
        end = stored.start + x.numel() * x.itemsize
        for block in range(stored.start // PIECE, -(-end // PIECE)):
            if block % self.comm.mesh.size == self.comm.rank:
                start, stop = max(stored.start, block * PIECE), min(end, (block + 1) * PIECE)
                piece = self.buffer[: stop - start].view(x.dtype)
                lo = (start - stored.start) // x.itemsize
                read(x, lo, lo + piece.numel(), piece)
                write_from(self.folder / stored.path, start, piece)

    def finish(self) -> None:
        """On the disk, or the error that kept it from there."""
        if self.trouble is not None:
            raise self.trouble
        for name in self.files.names:
            _sync(self.folder / name)


def _rename(growing: Path, path: Path) -> None:
    _sync(growing)
    os.replace(growing, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
