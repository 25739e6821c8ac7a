"""The global norm of a gradient that is spread over ranks, copies counted once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharding import Comm

from .differentiate import sum_over_ranks


def global_norm(grads: Sequence[Tensor], counts_once: Sequence[bool], comm: Comm) -> Tensor:
    """``sqrt(sum of the squares of the whole gradient)``, each entry once; equal on every rank.

    Args:
        grads: this rank's shards.
        counts_once: for each, whether this rank's copy is the one that counts
            (``plan.counts_once(comm)``).
        comm: the ranks.
    """
    return sum_over_ranks([local_squares(grads, counts_once)], comm)[0].sqrt()


def local_squares(grads: Sequence[Tensor], counts_once: Sequence[bool]) -> Tensor:
    """This rank's summand of the square of the norm."""
    squares = [
        torch.dot(g, g).double() for g, counts in zip(grads, counts_once, strict=True) if counts
    ]
    device = grads[0].device if grads else None
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device).double()
