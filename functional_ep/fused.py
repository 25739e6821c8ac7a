"""AdamW in torch's fused kernel, in place: over whole vector registers, and piece by piece.

A gradient in factors is never whole: each piece of it is multiplied out and used at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .factored import Factored

Leaves = list[Tensor]
Columns = tuple[Leaves, ...]  # parameters, gradients, first and second moments

VECTOR = 16  # entries; a multiple of every CPU's vector register, float32 and wider


def fused_adamw(
    step: Tensor, columns: Columns, hyper: dict[str, float], factor: Tensor | None
) -> None:
    """One step of all leaves, written into parameters and moments.

    Args:
        step: how many there have been.
        columns: flat parameters, gradients, first and second moments, in one order.
        hyper: as torch's kernel names them.
        factor: of the gradients, which are then the kernel's to write into.

    >>> p, g, m, v = (torch.full((1,), x) for x in (1.0, 1.0, 0.0, 0.0))
    >>> hyper = dict(lr=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0, eps=1e-8)
    >>> fused_adamw(torch.tensor(0), ([p], [g], [m], [v]), hyper, None)
    >>> p
    tensor([0.9000])
    """
    kernel = _Kernel(step, hyper, factor)
    for some in _in_pieces(*columns):
        for part in _whole_vectors(*some):
            kernel(part)


class _Kernel:
    """In place. The kernel divides by its scale on the way, a float32: for narrow leaves only."""

    def __init__(self, step: Tensor, hyper: dict[str, float], factor: Tensor | None) -> None:
        self.step, self.hyper, self.factor = float(step + 1), hyper, factor
        self.steps: dict[torch.device, Tensor] = {}
        self.scale = None if factor is None else (1 / factor).float()

    def __call__(self, columns: Columns) -> None:
        device = columns[0][0].device
        if device not in self.steps:  # made there, which sends nothing
            self.steps[device] = torch.full((), self.step, dtype=torch.float32, device=device)
        steps = [self.steps[device]] * len(columns[0])
        scale = None
        if self.scale is not None and all(g.dtype.itemsize <= 4 for g in columns[1]):
            scale = self.scale.to(device)
        elif self.factor is not None:
            torch._foreach_mul_(columns[1], self.factor.to(device))
        # Its stub knows neither unpacked lists nor unpacked keywords.
        torch._fused_adamw_(  # pyright: ignore[reportCallIssue]
            *columns, [], steps, **self.hyper, amsgrad=False, maximize=False, grad_scale=scale
        )


def _in_pieces(p: Leaves, grads: Leaves, m: Leaves, v: Leaves) -> Iterator[Columns]:
    """Parameters, gradients and moments: of all leaves that are there, then piece by piece."""
    rows = list(zip(p, grads, m, v, strict=True))
    alike: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}  # a GPU's kernel takes one at a time
    for row in rows:
        if not isinstance(row[1], Factored):
            alike.setdefault(row[0].dtype, []).append(row)
    for some in alike.values():
        yield tuple(map(list, zip(*some, strict=True)))
    for p_i, g, m_i, v_i in rows:
        if isinstance(g, Factored):
            cut = [x.split(g.cuts()) for x in (p_i, m_i, v_i)]
            for pieces in g.pieces():
                ps, ms, vs = ([parts[number] for number, _ in pieces] for parts in cut)
                if pieces:
                    yield ps, [values for _, values in pieces], ms, vs


def _whole_vectors(*columns: Leaves) -> Iterator[Columns]:
    """The same lists in pieces whose sizes are multiples of a vector register's.

    The fused CPU kernel rounds the last, partial vector of a tensor otherwise than full ones, so an
    entry's bits would depend on where the shard it lives in ends.
    """
    if all(x.is_cuda or not x.numel() % VECTOR for x in columns[0]):
        yield columns
        return
    whole: Columns = tuple([] for _ in columns)
    rest: Columns = tuple([] for _ in columns)
    for leaves in zip(*columns, strict=True):
        size = leaves[0].numel()
        cut = size if leaves[0].is_cuda else size - size % VECTOR
        for column, tail, x in zip(whole, rest, leaves, strict=True):
            column.append(x[:cut])
            tail.append(x[cut:])
    if whole[0]:
        yield whole
    ends = [i for i, x in enumerate(rest[0]) if x.numel()]
    if ends:
        filled = tuple(
            [torch.nn.functional.pad(tail[i], (0, VECTOR - tail[i].numel())) for i in ends]
            for tail in rest
        )
        yield filled
        for tail, column in zip(rest, filled, strict=True):
            for i, x in zip(ends, column, strict=True):
                tail[i].copy_(x[: tail[i].numel()])
