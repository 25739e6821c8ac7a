"""Agreement: what must be the same on every rank, checked before anything can hang on it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from torch import Tensor

from functional_ep.sealed import Damaged
from sharding import Comm
from sharding.tree import flatten, path_strings, show

R = TypeVar("R")


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
    texts = [other.decode() for other in gather_bytes(text.encode(), comm)]
    rank, other = next((r, other) for r, other in enumerate(texts) if other != texts[0])
    first, its = set(texts[0].split("\n")), set(other.split("\n"))
    raise ValueError(
        f"the {what} differs between ranks, but all have to make the same calls on the same data. "
        f"Only rank 0 has {sorted(first - its)}, only rank {rank} has {sorted(its - first)}"
    )


def gather_bytes(mine: bytes, comm: Comm) -> list[bytes]:
    """``[bytes of rank r for r in mesh]``, on every rank; they may differ in length.

    >>> from sharding import Mesh, simulate
    >>> simulate(lambda comm: gather_bytes(b"a" * comm.rank, comm), Mesh(ep=3))[0]
    [b'', b'a', b'aa']
    """
    axes, device = comm.mesh.axes, comm.device
    row = torch.frombuffer(bytearray(mine) or bytearray(1), dtype=torch.uint8)[: len(mine)]
    sizes = comm.all_gather([torch.tensor([len(mine)], device=device)], axes)[0].tolist()
    padded = torch.nn.functional.pad(row.to(device), (0, max(sizes) - len(mine)))
    (rows,) = comm.all_gather([padded], axes)
    rows = rows.cpu().view(comm.mesh.size, -1)
    return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=True)]


ERRORS = {
    kind.__name__: kind
    for kind in (
        Damaged,
        ValueError,
        TypeError,
        OSError,
        FileNotFoundError,
        FileExistsError,
        BlockingIOError,
    )
}


def together(action: Callable[[], R], comm: Comm) -> R:
    """``action()`` on every rank; if it fails on one, the same error on all, which names the rank.

    The action must not communicate. All ranks have to call.

    >>> from sharding import Mesh, simulate
    >>> simulate(lambda comm: together(lambda: [1][comm.rank], comm), Mesh(ep=2))
    ... # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    RuntimeError: rank 1: IndexError: list index out of range...
    """
    try:
        result = action()
    except Exception as error:
        failure = common_failure(error, comm)
        assert failure is not None
        raise failure from (None if failure is error else error)
    failure = common_failure(None, comm)
    if failure is not None:
        raise failure
    return result


def common_failure(error: Exception | None, comm: Comm) -> Exception | None:
    """None if no rank has an error; else, on all of them alike, the one of the first that has.

    It names the rank, unless the others say the same; files and numbers of system errors are kept.
    """
    if comm.mesh.size == 1:
        return error
    failed = torch.tensor([int(error is not None)], device=comm.device)
    if not comm.all_reduce([failed], comm.mesh.axes)[0].item():
        return None
    texts = gather_bytes(b"" if error is None else json.dumps(_told(error)).encode(), comm)
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
    kind, number, message, file = json.loads(text)
    if len(set(texts)) > 1:
        message = f"rank {rank}: {message}"
    if number is not None:
        return OSError(number, message, file)
    return ERRORS.get(kind, RuntimeError)(message)


def _told(error: Exception) -> tuple[str, int | None, str, str | None]:
    kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in ERRORS), "")
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        return kind, error.errno, error.strerror or "", file
    return kind, None, str(error) if kind else f"{type(error).__name__}: {error}", None
