"""Ranks without tokens: they take part with one of their own making, and count nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def standing_in(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One token in place of none: transformers' models do not run without, and all ranks must.

    >>> import torch
    >>> standing_in({"input_ids": torch.zeros(0, 5, dtype=torch.int64), "use_cache": False})
    {'input_ids': tensor([[0, 0, 0, 0, 0]]), 'use_cache': False}
    """
    return {
        name: x.new_full(without_zeros(x), name.endswith("attention_mask"))
        if isinstance(x, Tensor) and not x.numel()
        else x
        for name, x in inputs.items()
    }


def without_zeros(x: Tensor) -> list[int]:
    """The shape with a one for every zero."""
    return [max(1, n) for n in x.shape]
