"""Ranks on CUDA: NCCL's collectives, one coalesced launch for a whole list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharding.comm import Divergence, Op, Then, Work
from sharding.distributed.overdue import Overdue
from sharding.distributed.ranks import DistributedComm
from sharding.divergence import Kinds
from sharding.mesh import Axes, Mesh

LATER = 30.0  # seconds after us that NCCL gives up as well, and ends the process

# As torch calls them, and as it did before 2.13.
GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Launched:
    """NCCL work on its own stream; awaiting it makes the current stream wait, not the host."""

    def __init__(self, works: Sequence[Any], out: list[Tensor], inputs: list[Tensor]) -> None:
        self.works, self.out, self.inputs = works, out, inputs

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        self.inputs = []
        return self.out


Group = tuple[bool, tuple[int, ...]]  # whether rows are exchanged, and the ranks in ascending order
Flight = tuple[_Launched, Callable[[list[Tensor]], list[Tensor]]]  # and what is left to do then


class NcclComm(DistributedComm):
    """Collectives by NCCL, coalesced: one launch for a list of tensors.

    Ranks that part ways are found by their collectives that do not complete within ``timeout``.
    What is launched has been run by another backend, and what is overdue with stand-ins for NCCL's
    works; none of it with NCCL itself.
    """

    def __init__(self, mesh: Mesh, rank: int, timeout: float, device: torch.device) -> None:
        self.late = Overdue(timeout, self._report)
        super().__init__(mesh, rank, timeout, device)
        self.groups: dict[Group, Any] = {(False, tuple(mesh)): dist.group.WORLD}
        self._make_groups()

    def on(self, mesh: Mesh) -> NcclComm:
        other = super().on(mesh)
        assert isinstance(other, NcclComm)
        other._make_groups()
        return other

    def close(self, how: str = "") -> None:
        self.late.close()
        super().close(how)

    def overdue(self) -> str:
        return str(self.late)

    def _report(self, problem: str) -> Divergence:
        return self.parted(f"rank {self.rank} {self.coords} has launched {problem}.", {})

    def _make_groups(self) -> None:
        """Two for each set of ranks that is a fiber along some axes, of this mesh or of another.

        A group's collectives run one after another. Rows and their counts, for which the host
        waits, go through a group of their own, so that they are not behind a gather ahead of time.
        """
        patience = timedelta(seconds=self.timeout + LATER)
        for axes in _subsets(self.mesh.axes):
            fibers = sorted({tuple(sorted(self.mesh.fiber(r, axes))) for r in self.mesh})
            (mine,) = [fiber for fiber in fibers if self.rank in fiber]
            for exchange in (False, True):
                if len(mine) > 1 and (exchange, mine) not in self.groups:
                    each = [list(fiber) for fiber in fibers]
                    group, _ = dist.new_subgroups_by_enumeration(each, timeout=patience)
                    self.groups[exchange, mine] = group

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        self.late.check()
        what = Kinds(xs)
        number = self.place.start(op, what)
        fiber = self.fiber(op.axes)
        ranks = tuple(sorted(fiber))
        order = [ranks.index(r) for r in fiber]
        xs = [x.detach().contiguous() for x in xs]
        exchange = op.kind == "all_to_all"
        launch = _launch_all_to_all if exchange else _launch
        launched, arrived = launch(op, xs, self.groups[exchange, ranks], order)
        named = partial(self.place.collective, number, op, what)
        self.late.launched((exchange, ranks), launched.works[-1], named)
        return Then(launched, arrived)


def _launch(op: Op, xs: list[Tensor], group: Any, order: list[int]) -> Flight:
    n, ascending = len(order), order == sorted(order)
    if op.kind == "reduce_scatter" and not ascending:
        xs = [_permute(x, n, [order.index(i) for i in range(n)]) for x in xs]
    out: list[Tensor] = list(xs)
    works: list[Any] = []
    for dtype in dict.fromkeys(x.dtype for x in xs):  # one launch carries one dtype
        same = [i for i, x in enumerate(xs) if x.dtype == dtype]
        # Without a device: with one, NCCL would be asked to group what is one launch already.
        with dist._coalescing_manager(group, async_ops=True) as coalesced:
            for i in same:
                out[i] = _add(op, xs[i], n, group)
        works += coalesced.works

    def arrived(ys: list[Tensor]) -> list[Tensor]:
        unsorted = op.kind == "all_gather" and not ascending
        return [_permute(y, n, order) for y in ys] if unsorted else ys

    return _Launched(works, out, xs), arrived


def _add(op: Op, x: Tensor, n: int, group: Any) -> Tensor:
    """One collective of a launch; its result is there once the launch has been awaited."""
    if op.kind == "all_gather":
        y = x.new_empty(n * len(x), *x.shape[1:])
        GATHER(y, x, group=group)
    elif op.kind == "reduce_scatter":
        y = x.new_empty(len(x) // n, *x.shape[1:])
        SCATTER(y, x, group=group)
    else:
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
    return y


def _launch_all_to_all(op: Op, xs: list[Tensor], group: Any, order: list[int]) -> Flight:
    out, works = [], []
    inverse = [order.index(i) for i in range(len(order))]
    send, receive = [op.send[i] for i in inverse], [op.receive[i] for i in inverse]
    if order != sorted(order):
        xs = [torch.cat([x.split(op.send)[i] for i in inverse]) for x in xs]
    for x in xs:
        out.append(x.new_empty(sum(receive), *x.shape[1:]))
        works.append(dist.all_to_all_single(out[-1], x, receive, send, group, async_op=True))

    def arrived(ys: list[Tensor]) -> list[Tensor]:
        if order == sorted(order):
            return ys
        return [torch.cat([y.split(receive)[i] for i in order]) for y in ys]

    return _Launched(works, out, xs), arrived


def _permute(x: Tensor, n: int, order: list[int]) -> Tensor:
    """The n slices of dim 0 in another order: NCCL knows ranks in ascending order only."""
    slices = x.view(n, len(x) // n, *x.shape[1:]).unbind()
    return torch.cat([slices[i] for i in order])


def _subsets(axes: Axes) -> Iterator[Axes]:
    for chosen in range(1, 1 << len(axes)):
        yield tuple(axis for i, axis in enumerate(axes) if chosen >> i & 1)
