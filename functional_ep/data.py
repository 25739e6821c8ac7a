"""Byte-level batches. Which bytes a step sees depends on (seed, step) alone, on every mesh."""

import lzma
import math
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from .corpus import Corpus, bytes_of

IGNORED = -100
"""The label of a position that has no next byte; the loss leaves it out."""

Batch = dict[str, Tensor]


class Baselines(NamedTuple):
    """What compresses the same bytes without a model, in bits per byte."""

    unigram: float
    xz: float


def share(total: int, rank: int, ranks: int) -> slice:
    """[rank total // ranks, (rank + 1) total // ranks): sizes differ by one at most.

    >>> [share(5, rank, 3) for rank in range(3)]
    [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None)]
    """
    return slice(rank * total // ranks, (rank + 1) * total // ranks)


def batch(
    text: Tensor,
    seed: int,
    step: int,
    *,
    sequences: int,
    length: int,
    rank: int = 0,
    ranks: int = 1,
) -> Batch:
    """This rank's share of a step's global batch: ``sequences`` windows at random places.

    The places depend on (seed, step) alone, so any number of ranks draws the same global batch, and
    a run resumes at any step without replaying those before. Labels are the next bytes.

    Shapes: ``input_ids`` and ``labels`` int64 [share of sequences, length]; the share may be empty.

    Raises:
        ValueError: ``text`` is shorter than one window of ``length + 1`` bytes.

    >>> text = torch.arange(100, dtype=torch.uint8)
    >>> both = [batch(text, 0, 7, sequences=3, length=4, rank=r, ranks=2) for r in range(2)]
    >>> [tuple(b["input_ids"].shape) for b in both]
    [(1, 4), (2, 4)]
    >>> bool((both[1]["labels"] == both[1]["input_ids"] + 1).all())
    True
    """
    _check_train(text, length)
    generator = torch.Generator().manual_seed(seed_of(f"{seed}/{step}"))
    starts = torch.randint(len(text) - length, (sequences,), generator=generator)
    mine = starts[share(sequences, rank, ranks)]
    rows = text[mine[:, None] + torch.arange(length + 1)].long()
    return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}


def seed_of(text: str) -> int:
    """A seed for a generator, another for every text."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def windows(
    text: Tensor, *, sequences: int, length: int, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Contiguous windows in batches: over all ranks, each byte but the first is predicted once.

    The last window is padded with labels -100. Every rank gets the same number of batches, so all
    of them meet in every collective; a rank's share of a batch may be empty.

    Raises:
        ValueError: ``text`` has fewer than two bytes, so there is nothing to predict.

    >>> [b["labels"].tolist() for b in windows(torch.arange(6), sequences=2, length=3)]
    [[[1, 2, 3], [4, 5, -100]]]
    """
    _check_valid(text)
    rows = -(-(len(text) - 1) // length)
    input_ids = torch.zeros(rows * length, dtype=torch.int64)
    labels = torch.full((rows * length,), IGNORED)
    input_ids[: len(text) - 1] = text[:-1]
    labels[: len(text) - 1] = text[1:]
    for first in range(0, rows, sequences):
        count = min(sequences, rows - first)
        mine = share(count, rank, ranks)
        rows_of = slice(first + mine.start, first + mine.stop)
        yield {
            "input_ids": input_ids.view(rows, length)[rows_of],
            "labels": labels.view(rows, length)[rows_of],
        }


def baselines(text: Tensor) -> Baselines:
    """Bits per byte of ``text[1:]``, the very bytes that `windows` asks for.

    ``unigram`` is the entropy of their frequencies, ``xz`` the size that ``xz -9e`` makes of them.

    >>> baselines(torch.tensor([0, 1, 2, 1, 2], dtype=torch.uint8)).unigram
    1.0
    """
    predicted = text[1:]
    frequency = torch.bincount(predicted.long()).double() / len(predicted)
    packed = lzma.compress(bytes_of(predicted), preset=9 | lzma.PRESET_EXTREME)
    return Baselines(
        unigram=torch.special.entr(frequency).sum().item() / math.log(2),
        xz=8 * len(packed) / len(predicted),
    )


def check(corpus: Corpus, length: int) -> None:
    """Refuse a corpus too short for windows of ``length + 1`` bytes, before any step is made."""
    _check_train(corpus.train, length)
    _check_valid(corpus.valid)


def _check_train(text: Tensor, length: int) -> None:
    if len(text) <= length:
        raise ValueError(
            f"the training text has {len(text)} bytes, fewer than one window of "
            f"seq + 1 = {length + 1}; give more --data, or a smaller seq"
        )


def _check_valid(text: Tensor) -> None:
    if len(text) < 2:
        raise ValueError(
            f"the validation text has {len(text)} bytes, and predicting needs 2; give more --data"
        )
