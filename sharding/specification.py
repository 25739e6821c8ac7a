"""What a raw collective is: from the lists that the ranks of a fiber send to those they receive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .comm import Op


def ordered_sum(xs: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """``((x0 + x1) + x2) + ...``: every transport adds in fiber order, so all agree to the bit."""
    total = torch.add(xs[0], xs[1], out=out) if len(xs) > 1 else xs[0].clone()
    for x in xs[2:]:
        total += x
    return total


def specification(op: Op, place: int, sent: Sequence[tuple[Op, list[Tensor]]]) -> list[Tensor]:
    """What the rank at ``place`` of a fiber receives when its ranks have sent ``sent``.

    >>> ranks = [(Op("all_gather", ("ep",)), [torch.tensor([1])]),
    ...          (Op("all_gather", ("ep",)), [torch.tensor([2])])]
    >>> specification(ranks[0][0], 0, ranks)
    [tensor([1, 2])]
    """
    columns = list(zip(*(xs for _, xs in sent), strict=True))
    if op.kind == "all_gather":
        return [torch.cat(column) for column in columns]
    if op.kind == "all_reduce":
        return [ordered_sum(column) for column in columns]
    if op.kind == "reduce_scatter":
        n = len(sent)
        return [ordered_sum([x.chunk(n)[place] if len(x) else x for x in c]) for c in columns]
    return [
        torch.cat([x.split(other.send)[place] for (other, _), x in zip(sent, c, strict=True)])
        for c in columns
    ]
