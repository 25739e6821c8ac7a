"""The files of a model: which tensor is in which, at which byte; headers, and the index of all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from functional_ep.huggingface.lazy import Lazy
from functional_ep.huggingface.names import Module
from functional_ep.huggingface.source import INDEX
from functional_ep.safetensors_file import Stored, make_header


class Files(NamedTuple):
    """How tensors are split into files, as transformers splits them."""

    headers: dict[str, tuple[bytes, int]]
    places: dict[str, Stored]
    total_size: int

    @property
    def names(self) -> list[str]:
        return list(self.headers)

    @classmethod
    def split(cls, tensors: Mapping[str, Lazy], max_shard_size: int | str, stem: str) -> Files:
        """Files of at most ``max_shard_size`` bytes, or of one tensor, named after ``stem``."""
        metas: dict[str, Tensor] = {
            name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in tensors.items()
        }
        split = split_torch_state_dict_into_shards(
            metas,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        headers: dict[str, tuple[bytes, int]] = {}
        places: dict[str, Stored] = {}
        for file, names in split.filename_to_tensors.items():
            header, stored, size = make_header(Path(file), {name: metas[name] for name in names})
            headers[file] = header, size
            places |= {one.name: one for one in stored}
        return cls(headers, places, split.metadata["total_size"])


def write_headers(folder: Path, files: Files, module: Module) -> None:
    """Every file in its full length, still without numbers, and the index if they are several."""
    for name, (header, size) in files.headers.items():
        with open(folder / name, "wb") as file:
            file.write(header)
            file.truncate(size)
    if len(files.headers) > 1:
        index = {
            "metadata": {
                "total_parameters": module.skeleton.num_parameters(),
                "total_size": files.total_size,
            },
            "weight_map": {name: str(place.path) for name, place in files.places.items()},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
