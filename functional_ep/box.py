"""Boxes: rectangular parts of a tensor, and the few that an interval of its numbers comes to."""

from __future__ import annotations

import math
from collections.abc import Iterator

Box = tuple[tuple[int, int], ...]
"""The half-open range of every dim."""


def sizes_of(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(hi - lo for lo, hi in box)


def slices_of(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(lo, hi) for lo, hi in box)


def boxes(lo: int, hi: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The interval ``[lo, hi)`` of a ravelled tensor as boxes, in order: whole rows and their rims.

    >>> list(boxes(1, 5, (3, 2)))
    [((0, 1), (1, 2)), ((1, 2), (0, 2)), ((2, 3), (0, 1))]
    """
    if lo >= hi:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-lo // row), hi // row
    if first > last:  # both ends lie in one row
        first = last + 1
        yield from _in_row(last, lo, hi, shape)
        return
    yield from _in_row(first - 1, lo, first * row, shape)
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    yield from _in_row(last, last * row, hi, shape)


def _in_row(i: int, lo: int, hi: int, shape: tuple[int, ...]) -> Iterator[Box]:
    start = i * math.prod(shape[1:])
    for box in boxes(lo - start, hi - start, shape[1:]):
        yield ((i, i + 1), *box)
