"""Digests: of memory, before it is written and after it is read, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import xxhash
from torch import Tensor

from functional_ep.safetensors_file import memory_of
from functional_ep.sealed import digest

BLOCK = 2**22  # bytes that are read and checked at a time: who needs a part reads a little more


def digest_of_all(slices: Iterable[memoryview]) -> tuple[str, int]:
    """The digest of bytes that come one slice after the other, and how many they are.

    >>> digest_of_all([memoryview(b"a"), memoryview(b"bc")]) == (digest(b"abc"), 3)
    True
    """
    seal, size = xxhash.xxh3_128(), 0
    for part in slices:
        seal.update(part)
        size += len(part)
    return seal.hexdigest(), size


def digests_of(x: Tensor, block: int) -> tuple[str, ...]:
    """One digest for every ``block`` bytes of a contiguous tensor, the last of what is left.

    >>> import torch
    >>> len(digests_of(torch.zeros(5), block=16))
    2
    """
    return tuple(map(digest, _blocks(memory_of(x), block)))


def _blocks(memory: memoryview, block: int) -> Iterator[memoryview]:
    for start in range(0, len(memory), block):
        yield memory[start : start + block]
