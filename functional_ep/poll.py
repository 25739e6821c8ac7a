"""The poll: how a vote is cast and counted, with one sum over all ranks.

Each rank casts a row of numbers: whether its sums are finite, and digests of what must not differ
between ranks. The rows are one table, which is summed over the ranks with the norm; so every rank
counts the same table and comes to the same verdict, without another message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding import Comm, Mesh, Plan
from sharding.mesh import Axes
from sharding.order import Order, sets_of_axes
from sharding.tree import flatten

from .bits import digest
from .differentiate import sum_over_ranks
from .norm import local_squares
from .state import State
from .vote import Reason, Vote


class Column(NamedTuple):
    """A number that every rank casts; it has to be the same in each group, a row of ranks."""

    reason: Reason
    groups: Tensor


class Poll:
    """What ranks cast in every step of a plan, and how the votes are counted."""

    def __init__(self, plan: Plan, comm: Comm, vote: Vote) -> None:
        mesh = plan.mesh
        self.plan, self.comm, self.vote = plan, comm, vote
        self.trained = plan.trained_positions
        copies = plan.copies(comm)
        self.copies = [copies[i] for i in self.trained]
        self.copied: dict[Axes, list[int]] = {}
        for i, layout in enumerate(plan.layouts):
            axes = layout.rule.copies(mesh)
            if mesh.count(axes) > 1:
                self.copied.setdefault(axes, []).append(i)
        everyone = _groups(mesh, mesh.axes)
        self.columns = [
            Column(Reason.ORDER, everyone),
            *(Column(Reason.ORDER, _groups(mesh, axes)) for axes in sets_of_axes(mesh)),
            *(Column(Reason.COPIES, _groups(mesh, axes)) for axes in self.copied),
            Column(Reason.STEP, everyone),
            Column(Reason.POSITION, everyone),
        ]

    def take(
        self,
        state: State,
        batches: Sequence[Any],
        total: Tensor,
        grads: Sequence[Tensor],
        order: Order,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The global norm of the gradient, and whether to take the step, for the metrics.

        Args:
            state: before the step.
            batches: of the step.
            total: this rank's sum of losses.
            grads: this rank's shards of the gradients of trained leaves.
            order: what has heard the collectives of the step.
        """
        squares = local_squares(grads, self.copies, self.comm)
        device = self.comm.device
        infinite = [torch.isfinite(x).logical_not().to(device) for x in (total, squares)]
        row: list[Tensor | int] = [Reason.LOSS * infinite[0] + Reason.GRADIENT * infinite[1]]
        row += order.digests().values()
        held = dict(zip(self.trained, grads, strict=True))
        row += [digest(list(self._held(state, held, each))) for each in self.copied.values()]
        row += [state.step, self._position(batches)]
        # Zeros where the rows of others will be added: a sum, so that it travels with the norm's.
        table = torch.zeros(self.comm.mesh.size, len(row), dtype=torch.int64, device=device)
        table[self.comm.rank] = torch.stack([torch.as_tensor(x, device=device) for x in row])
        squares, table = sum_over_ranks([squares, table], self.comm)
        veto = self.count(table)
        return squares.sqrt(), {"committed": (veto == 0).all(), "veto": veto}

    def count(self, table: Tensor) -> Tensor:
        """``(ranks,)``: each rank's reasons against the step, from what all have cast."""
        finite, *columns = table.cpu().unbind(1)
        veto = finite.clone()
        if bool((veto & int(Reason.LOSS)).any()):
            veto &= ~int(Reason.GRADIENT)  # which follows from it, on ranks that are not to blame
        for values, (reason, groups) in zip(columns, self.columns, strict=True):
            for rank in _odd_ones_out(values, groups):
                veto[rank] |= int(reason)
        return veto

    def _held(
        self, state: State, grads: Mapping[int, Tensor], where: Sequence[int]
    ) -> Iterator[Tensor]:
        """All that a rank holds of some leaves."""
        params, _ = flatten(state.params)
        for i in where:
            leaf = self.plan.leaves[i]
            yield params[i]
            if i in grads:
                yield grads[i]
                yield from (by_path[leaf.path] for by_path in state.opt[leaf.label].values())

    def _position(self, batches: Sequence[Any]) -> int:
        """One number for the positions of all microbatches."""
        whole = 0
        for batch in batches if self.vote.position else ():
            assert self.vote.position is not None
            whole = (31 * whole + int(self.vote.position(batch))) % 2**62
        return whole


def _groups(mesh: Mesh, axes: Axes) -> Tensor:
    return torch.tensor(sorted({mesh.fiber(rank, axes) for rank in mesh}))


def _odd_ones_out(values: Tensor, groups: Tensor) -> list[int]:
    """The ranks whose value is not what most of their group have; of equally many, the first's."""
    rows = values[groups]
    odd: list[int] = []
    for i in (rows != rows[:, :1]).any(1).nonzero().flatten().tolist():
        (usual, _), *_ = Counter(rows[i].tolist()).most_common()
        odd += groups[i][rows[i] != usual].tolist()
    return odd
