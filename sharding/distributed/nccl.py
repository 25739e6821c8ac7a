"""Ranks on CUDA: NCCL's collectives, one coalesced launch for a whole list of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharding.comm import Divergence, Op, Then, Work
from sharding.distributed.overdue import Overdue
from sharding.distributed.ranks import DistributedComm
from sharding.divergence import Kinds
from sharding.mesh import Axes, Mesh


class _Launched:
    """NCCL work on its own stream; awaiting it makes the current stream wait, not the host."""

    def __init__(self, works: Sequence[Any], out: list[Tensor], inputs: list[Tensor]) -> None:
        self.works, self.out, self.inputs = works, out, inputs

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        self.inputs = []
        return self.out


Flight = tuple[_Launched, Callable[[list[Tensor]], list[Tensor]]]  # and what is left to do then


class NcclComm(DistributedComm):
    """Collectives by NCCL, coalesced: one launch for a list of tensors.

    Ranks that part ways are found by their collectives that do not complete within ``timeout``.
    That part has been run with stand-ins for NCCL's works only, never with NCCL itself.
    """

    def __init__(self, mesh: Mesh, rank: int, devices: DeviceMesh, timeout: float) -> None:
        self.late = Overdue(timeout, self._report)
        super().__init__(mesh, rank, devices, timeout)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.groups: dict[tuple[int, ...], Any] = {tuple(mesh): dist.group.WORLD}
        self._make_groups()

    def on(self, mesh: Mesh) -> NcclComm:
        other = super().on(mesh)
        assert isinstance(other, NcclComm)
        other.groups = dict(self.groups)
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
        mesh = self.mesh
        for axes in _subsets(mesh.axes):
            fibers = sorted({mesh.fiber(r, axes) for r in mesh})
            if len(fibers) > 1 and len(fibers[0]) > 1:
                group, _ = dist.new_subgroups_by_enumeration([list(f) for f in fibers])
                self.groups[self.fiber(axes)] = group

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        self.late.check()
        what = Kinds(xs)
        number = self.place.start(op, what)
        fiber = self.fiber(op.axes)
        ranks = tuple(sorted(fiber))
        order = [ranks.index(r) for r in fiber]
        xs = [x.detach().contiguous() for x in xs]
        if op.kind == "all_to_all":
            launched, arrived = _launch_all_to_all(op, xs, self.groups[ranks], order)
        else:
            launched, arrived = self._launch(op, xs, self.groups[ranks], order)
        named = partial(self.place.collective, number, op, what)
        self.late.launched(ranks, launched.works[-1], named)
        return Then(launched, arrived)

    def _launch(self, op: Op, xs: list[Tensor], group: Any, order: list[int]) -> Flight:
        n, ascending = len(order), order == sorted(order)
        if op.kind == "reduce_scatter" and not ascending:
            xs = [_permute(x, n, [order.index(i) for i in range(n)]) for x in xs]
        out: list[Tensor] = list(xs)
        works: list[Any] = []
        for dtype in dict.fromkeys(x.dtype for x in xs):  # one launch carries one dtype
            same = [i for i, x in enumerate(xs) if x.dtype == dtype]
            with dist._coalescing_manager(group, async_ops=True, device=self.device) as coalesced:
                for i in same:
                    out[i] = _launch(op, xs[i], n, group)
            works += coalesced.works

        def arrived(ys: list[Tensor]) -> list[Tensor]:
            unsorted = op.kind == "all_gather" and not ascending
            return [_permute(y, n, order) for y in ys] if unsorted else ys

        return _Launched(works, out, xs), arrived


def _launch(op: Op, x: Tensor, n: int, group: Any) -> Tensor:
    """Start one collective; the result is there once the coalesced launch has been awaited."""
    if op.kind == "all_gather":
        y = x.new_empty(n * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(y, x, group=group)
    elif op.kind == "reduce_scatter":
        y = x.new_empty(len(x) // n, *x.shape[1:])
        dist.reduce_scatter_tensor(y, x, group=group)
    else:
        y = x.clone()
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
    return x.view(n, len(x) // n, *x.shape[1:])[order].view(x.shape)


def _subsets(axes: Axes) -> Iterator[Axes]:
    for chosen in range(1, 1 << len(axes)):
        yield tuple(axis for i, axis in enumerate(axes) if chosen >> i & 1)
