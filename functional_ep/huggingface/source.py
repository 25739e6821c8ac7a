"""Where weights come from: a directory in hub layout, a state dict or a module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from functional_ep.huggingface.lazy import Lazy
from functional_ep.huggingface.moves import Fill
from functional_ep.safetensors_file import Stored, read_header

Source: TypeAlias = "str | Path | Mapping[str, Tensor] | nn.Module"

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Given(NamedTuple):
    """A tensor of the source, which can be read box by box, and words that say where it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    fill: Fill
    where: str

    def __str__(self) -> str:
        return f"{self.name} {self.shape} of {self.where}"


def open_source(source: Source) -> dict[str, Given]:
    """Every tensor of the source by the name that it has there; no number is read.

    Raises:
        FileNotFoundError: no such directory, no config, no weights, a file of the index missing.
        ValueError: a damaged file, pickled weights, something that is no tensor in memory.
        TypeError: no source.
    """
    if isinstance(source, str | Path):
        return {name: _in_file(stored) for name, stored in _directory(Path(source)).items()}
    if isinstance(source, nn.Module):
        return _in_memory(source.state_dict(), type(source).__name__)
    if isinstance(source, Mapping):
        return _in_memory(source, "the state dict")
    raise TypeError(
        f"weights come from a directory, a state dict or a module, not from {type(source).__name__}"
    )


def _in_file(stored: Stored) -> Given:
    return Given(stored.name, stored.shape, stored.dtype, stored.fill, str(stored.path))


def _in_memory(tensors: Mapping[str, Any], where: str) -> dict[str, Given]:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.is_meta:
            found = f"is {type(x).__name__}" if not isinstance(x, Tensor) else "is a meta tensor"
            raise ValueError(f"{name} of {where} {found}: weights are tensors that hold numbers")
    return {
        name: Given(name, tuple(x.shape), x.dtype, Lazy.of(x.detach()).fill, where)
        for name, x in tensors.items()
    }


def _directory(path: Path) -> dict[str, Stored]:
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is no directory: weights are read from a local directory in hub layout, such "
            "as huggingface_hub.snapshot_download(name) returns"
        )
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: it is no Hugging Face model")
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    if (path / INDEX).is_file():
        return _sharded(path)
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        raise ValueError(
            f"{path} has its weights as {pickled[0]}: reading a pickle runs whatever code is in "
            "it, so it is never opened. Where you trust it, convert it once: "
            f"AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(other_path)"
        )
    raise FileNotFoundError(f"{path} has no weights: neither {SINGLE} nor {INDEX} is there")


def _sharded(path: Path) -> dict[str, Stored]:
    index = path / INDEX
    try:
        where: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it has no readable weight_map ({error!r})") from None
    tensors: dict[str, Stored] = {}
    for file in files:
        if not (path / file).is_file():
            lost = [name for name, place in where.items() if place == file]
            raise FileNotFoundError(
                f"{path / file} is missing: {index.name} says that {lost[0]} and {len(lost) - 1} "
                "other tensors are in it. Copy or download it"
            )
        for name, stored in read_header(path / file).items():
            if name in tensors:
                raise ValueError(f"{name} is in two files, {tensors[name].path} and {stored.path}")
            tensors[name] = stored
    for name, file in where.items():
        if name not in tensors or tensors[name].path.name != file:
            raise ValueError(
                f"{path / file} has no tensor {name}, but {index.name} says so: the files are not "
                "of one download"
            )
    return tensors
