"""Schedules: hyperparameters as functions of the step. One clock for every label.

A schedule maps the step, an integer tensor that counts from 0, to a float64 scalar. With warm-up
the value rises linearly and reaches its peak at step ``warmup - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]


def at(value: float | Schedule, step: Tensor) -> Tensor:
    """The value at a step; a number is a constant schedule, and what a schedule may give.

    >>> at(0.1, torch.tensor(5))
    tensor(0.1000, dtype=torch.float64)
    """
    found: Any = value(step) if callable(value) else value
    return found if isinstance(found, Tensor) else torch.full((), found, dtype=torch.float64)


def constant(value: float, *, warmup: int = 0) -> Schedule:
    """``value``, after a linear warm-up.

    >>> [float(constant(1.0, warmup=2)(torch.tensor(step))) for step in range(3)]
    [0.5, 1.0, 1.0]
    """
    return _schedule(warmup, lambda step: torch.full_like(step, value))


def cosine(peak: float, *, warmup: int = 0, total: int, final: float = 0.0) -> Schedule:
    """``final + (peak - final) (1 + cos(pi t)) / 2``, t from 0 at the end of warm-up to 1 at total.

    Raises:
        ValueError: a warm-up that is not shorter than the total.

    >>> [float(cosine(1.0, total=4)(torch.tensor(step))) for step in (0, 2, 4)]
    [1.0, 0.5, 0.0]
    """
    fraction = _progress(warmup, total)

    def shape(step: Tensor) -> Tensor:
        return final + (peak - final) * (1 + torch.cos(math.pi * fraction(step))) / 2

    return _schedule(warmup, shape)


def linear(peak: float, *, warmup: int = 0, total: int, final: float = 0.0) -> Schedule:
    """``peak + (final - peak) t``, t from 0 at the end of warm-up to 1 at total.

    >>> [float(linear(1.0, total=4)(torch.tensor(step))) for step in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    fraction = _progress(warmup, total)
    return _schedule(warmup, lambda step: peak + (final - peak) * fraction(step))


def wsd(peak: float, *, warmup: int = 0, decay: int, total: int, final: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: ``peak`` until ``total - decay``, then linear to ``final`` at total.

    Raises:
        ValueError: warm-up and decay that do not fit into the total, or no decay.

    >>> [float(wsd(1.0, decay=2, total=6)(torch.tensor(step))) for step in (0, 4, 5, 6)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if decay < 1:
        raise ValueError(f"wsd: decay={decay}: at least one step")
    if warmup + decay > total:
        raise ValueError(f"wsd: warmup={warmup} and decay={decay} do not fit into total={total}")
    fraction = _progress(total - decay, total)
    return _schedule(warmup, lambda step: peak + (final - peak) * fraction(step))


def _progress(start: int, end: int) -> Schedule:
    if not 0 <= start < end:
        raise ValueError(f"a schedule from step {start} to step {end}: the end must come later")
    return lambda step: ((step - start) / (end - start)).clamp(0.0, 1.0)


def _schedule(warmup: int, shape: Schedule) -> Schedule:
    if warmup < 0:
        raise ValueError(f"warmup={warmup}: the value would start below zero, and grow from there")

    def value(step: Tensor) -> Tensor:
        step = step.to(torch.float64)
        rising = ((step + 1) / warmup).clamp(max=1.0) if warmup else 1.0
        return rising * shape(step)

    return value
