"""The global norm of a gradient that is spread over ranks, copies counted once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharding import Comm
from sharding.inner import counted_once, products
from sharding.plan import Copy

from .differentiate import sum_over_ranks
from .factored import Factored


def global_norm(grads: Sequence[Tensor], copies: Sequence[Copy], comm: Comm) -> Tensor:
    """``sqrt(sum of the squares of the whole gradient)``, each entry once; equal on every rank.

    Args:
        grads: this rank's shards.
        copies: for each, which other ranks hold it, and whether this one counts
            (``plan.copies(comm)``).
        comm: the ranks.
    """
    return sum_over_ranks([local_squares(grads, copies, comm)], comm)[0].sqrt()


def local_squares(grads: Sequence[Tensor], copies: Sequence[Copy], comm: Comm) -> Tensor:
    """This rank's summand of the square of the norm."""
    if torch._C._are_functorch_transforms_active():
        return counted_once([torch.stack(_squares(g)).sum() for g in grads], copies, comm)
    squares = [
        part for g, copy in zip(grads, copies, strict=True) if copy.counts for part in _squares(g)
    ]
    device = grads[0].device if grads else None
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device).double()


def _squares(g: Tensor) -> list[Tensor]:
    """Parts of the sum of a gradient's squares."""
    return [g.squares()] if isinstance(g, Factored) else products(g, g)
