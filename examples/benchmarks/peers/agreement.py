"""Whether a training is the same: its losses against those of the reference, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

COMPARED = 10
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


class Agreement(NamedTuple):
    """The largest relative difference of a loss, and the first step with one beyond tolerance."""

    largest: float
    step: int | None
    found: float = math.nan
    expected: float = math.nan

    def __str__(self) -> str:
        if self.step is None:
            return f"{self.largest:.0e}"
        return f"**DIFFERS** at step {self.step}: {self.found:.7g} for {self.expected:.7g}"


def agreement(losses: Sequence[float], expected: Sequence[float], dtype: str) -> Agreement:
    """``|loss - expected| <= tolerance |expected|`` at each of the first ten steps.

    >>> agreement([2.0, 1.0], [2.0, 1.0], "float32").step
    >>> agreement([2.0, 1.1], [2.0, 1.0], "float32").step
    1
    """
    steps = min(COMPARED, len(losses), len(expected))
    if not steps:
        raise ValueError("no losses to compare")
    pairs = list(zip(losses[:steps], expected[:steps], strict=True))
    off = [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs]
    wrong = next((i for i, x in enumerate(off) if not x <= TOLERANCE[dtype]), None)
    return Agreement(max(off), wrong, *(() if wrong is None else pairs[wrong]))
