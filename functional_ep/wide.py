"""Half precision is for storing and multiplying; what is summed or divided is wide."""

from __future__ import annotations

from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """float32 of what is narrower, and the tensor itself otherwise.

    >>> import torch
    >>> [wide(torch.ones(1, dtype=d)).dtype for d in (torch.bfloat16, torch.float64)]
    [torch.float32, torch.float64]
    """
    return x.float() if x.dtype.itemsize < 4 else x
