"""Agreement: what must be the same on every rank, checked before anything can hang on it."""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from sharding import Comm
from sharding.tree import flatten, path_strings, show


def structure_of(batches: tuple[Any, ...]) -> str:
    """Paths, dtypes and dims of a batch, without sizes or numbers: those may differ.

    >>> structure_of(({"input_ids": torch.zeros(2, 8, dtype=torch.int64)},))
    "batch[0]['input_ids']: int64 with 2 dims"
    """
    leaves, _ = flatten(batches)
    lines = [
        f"{show(path, 'batch')}: {_describe(leaf)}"
        for path, leaf in zip(path_strings(batches), leaves, strict=True)
    ]
    return "\n".join(lines)


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype)[6:]} with {leaf.dim()} dims"
    return type(leaf).__name__


def check_agreement(text: str, what: str, comm: Comm) -> None:
    """Refuse a text that is not the same on every rank, before anything can hang on it.

    Numbers d of all ranks are equal just if ``n sum(d^2) = (sum d)^2``: one sum of a few integers
    decides for all ranks alike, and only if it must are the texts themselves exchanged.

    Raises:
        ValueError: on every rank, with what differs and where.
    """
    n = comm.mesh.size
    if n == 1:
        return
    digest = blake2b(text.encode(), digest_size=4).digest()
    numbers = struct.unpack("HH", digest)  # so narrow that squares add up exactly
    sums = torch.tensor([[d, d * d] for d in numbers], device=comm.device)
    (sums,) = comm.all_reduce([sums], comm.mesh.axes)
    if any(n * squares != total * total for total, squares in sums.tolist()):
        _refuse(text, what, comm)


def _refuse(text: str, what: str, comm: Comm) -> None:
    axes, device = comm.mesh.axes, comm.device
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    sizes = comm.all_gather([torch.tensor([mine.numel()], device=device)], axes)[0].tolist()
    padded = torch.nn.functional.pad(mine, (0, max(sizes) - mine.numel()))
    rows = comm.all_gather([padded], axes)[0].view(comm.mesh.size, -1)
    texts = [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]
    rank, other = next((r, other) for r, other in enumerate(texts) if other != texts[0])
    first, its = set(texts[0].split("\n")), set(other.split("\n"))
    raise ValueError(
        f"the {what} differs between ranks, but all have to make the same calls on the same data. "
        f"Only rank 0 has {sorted(first - its)}, only rank {rank} has {sorted(its - first)}"
    )
