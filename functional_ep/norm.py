"""The global norm of a gradient that is spread over ranks, copies counted once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharding import Comm

from .differentiate import sum_over_ranks
from .factored import Factored

PIECE = 1 << 18  # entries whose squares are summed in the gradient's own dtype


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
        part for g, counts in zip(grads, counts_once, strict=True) if counts for part in _squares(g)
    ]
    device = grads[0].device if grads else None
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device).double()


def _squares(g: Tensor) -> list[Tensor]:
    """Parts of the sum of a gradient's squares.

    A CPU sums one addend after another: in float32, of 10^7 at once, half of the digits go.
    """
    if isinstance(g, Factored):
        return [g.squares()]
    return [torch.dot(x, x).double() for x in ((g,) if g.is_cuda else g.split(PIECE))]
