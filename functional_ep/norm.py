"""The global norm of a gradient that is spread over ranks, copies counted once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharding import Comm
from sharding.collectives import pvary
from sharding.plan import Copy

from .differentiate import sum_over_ranks
from .factored import Factored
from .wide import wide

PIECE = 1 << 18  # entries whose squares are summed in the gradient's own dtype


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
        return _differentiable_squares(grads, copies, comm)
    squares = [
        part for g, copy in zip(grads, copies, strict=True) if copy.counts for part in _squares(g)
    ]
    device = grads[0].device if grads else None
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device).double()


def _differentiable_squares(grads: Sequence[Tensor], copies: Sequence[Copy], comm: Comm) -> Tensor:
    """The same, of copies that are one value: the derivative by each is that by all of them."""
    total = torch.zeros((), dtype=torch.float64, device=comm.device)
    for copy in dict.fromkeys(copies):
        same = [
            part for g, c in zip(grads, copies, strict=True) if c == copy for part in _squares(g)
        ]
        squares = torch.stack(same).sum()
        total = total + (pvary(squares, copy.axes, comm) if copy.axes else squares) * copy.counts
    return total


def _squares(g: Tensor) -> list[Tensor]:
    """Parts of the sum of a gradient's squares.

    A CPU sums one addend after another: in float32, of 10^7 at once, half of the digits go.
    """
    if isinstance(g, Factored):
        return [g.squares()]
    pieces = (g,) if g.is_cuda else g.split(PIECE)
    return [torch.dot(x, x).double() for x in map(wide, pieces)]
