"""Ranks on CPU: every collective is an exchange of slices between pairs of ranks.

Slices travel straight from the input into the slices of the output; gloo's own all-gather and
reduce-scatter move each byte several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sharding.buffers import Buffers
from sharding.comm import Divergence, Op, Then, Work, ordered_sum
from sharding.distributed.ranks import DistributedComm
from sharding.mesh import Mesh
from sharding.packing import pack

ONE_HOP = 1 << 18  # bytes up to which an all-reduce sends everything to everyone at once


class Exchange:
    """Messages under way to and from the other ranks of a fiber."""

    def __init__(self, comm: PairwiseComm, op: Op, out: list[Tensor]) -> None:
        self.comm, self.op, self.out = comm, op, out
        self.messages: list[tuple[int, Any]] = []
        self.keep: list[Tensor] = []  # what is being sent must outlive the sending
        comm.started += 1
        self.number = comm.started

    def send(self, x: Tensor, peer: int) -> None:
        if x.numel():
            self.keep.append(x)
            self.attempt(peer, lambda: self.messages.append((peer, dist.isend(x, peer))))

    def receive(self, x: Tensor, peer: int) -> None:
        if x.numel():
            self.attempt(peer, lambda: self.messages.append((peer, dist.irecv(x, peer))))

    def wait(self) -> list[Tensor]:
        patience = timedelta(seconds=self.comm.timeout)
        while self.messages:
            peer, message = self.messages.pop(0)
            self.attempt(peer, lambda message=message: message.wait(patience))
        self.keep = []
        return self.out

    def __del__(self) -> None:
        # Nobody asked for the result (a view fetched ahead of a backward pass that ended early),
        # but its memory may go only after the messages have.
        with suppress(Exception):
            self.wait()

    def attempt(self, peer: int, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as error:
            self.messages = []
            comm, mesh = self.comm, self.comm.mesh
            shapes = ", ".join(str(list(x.shape)) for x in self.out)
            raise Divergence(
                f"rank {comm.rank} {comm.coords} is at {self.op} with result [{shapes}], its "
                f"collective no. {self.number}; rank {peer} {mesh.coords(peer)} did not join it "
                f"within {comm.timeout:g} s or has gone. Every rank of a fiber must start the same "
                f"collectives in the same order, also a rank with no tokens. ({error})"
            ) from error


class PairwiseComm(DistributedComm):
    """Collectives as messages between pairs of ranks."""

    def __init__(self, mesh: Mesh, rank: int, devices: DeviceMesh, timeout: float) -> None:
        super().__init__(mesh, rank, devices, timeout)
        self.buffers = Buffers()

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        xs = [x.detach().contiguous() for x in xs]
        if op.kind == "all_to_all":
            return self._all_to_all(op, xs)
        n = len(self.fiber(op.axes))
        packed, unpack = pack(op.kind, xs, n)
        if op.kind == "all_gather":
            return Then(self._all_gather(op, packed), unpack)
        if op.kind == "reduce_scatter":
            return Then(self._reduce_scatter(op, packed), unpack)
        return Then(self._all_reduce(op, packed), unpack)

    def _peers(self, op: Op) -> Iterator[tuple[int, int, int, int]]:
        """Each round's partners, as places and as ranks: whom to receive from, whom to send to."""
        fiber, me = self.fiber(op.axes), self.index(op.axes)
        for d in range(1, len(fiber)):
            source, target = (me - d) % len(fiber), (me + d) % len(fiber)
            yield source, fiber[source], target, fiber[target]

    def _all_gather(self, op: Op, xs: list[Tensor]) -> Work:
        n, me = len(self.fiber(op.axes)), self.index(op.axes)
        out = [self.buffers.take((n * len(x), *x.shape[1:]), x) for x in xs]
        slices = [y.view(n, *x.shape) for x, y in zip(xs, out, strict=True)]
        exchange = Exchange(self, op, out)
        for source, sender, _, receiver in self._peers(op):
            for x, y in zip(xs, slices, strict=True):
                exchange.receive(y[source], sender)
                exchange.send(x, receiver)
        for x, y in zip(xs, slices, strict=True):
            y[me].copy_(x)
        return exchange

    def _reduce_scatter(self, op: Op, xs: list[Tensor]) -> Work:
        n, me = len(self.fiber(op.axes)), self.index(op.axes)
        slices = [x.view(n, len(x) // n, *x.shape[1:]) for x in xs]
        parts = [[s[me]] * n for s in slices]
        exchange = Exchange(self, op, [])
        for source, sender, target, receiver in self._peers(op):
            for s, part in zip(slices, parts, strict=True):
                part[source] = self.buffers.take(s.shape[1:], s)
                exchange.receive(part[source], sender)
                exchange.send(s[target], receiver)
        return Then(exchange, lambda _: [self._sum(part) for part in parts])

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        total = self.buffers.take(parts[0].shape, parts[0])
        torch.add(parts[0], parts[1], out=total)
        for part in parts[2:]:
            total += part
        return total

    def _all_reduce(self, op: Op, xs: list[Tensor]) -> Work:
        n = len(self.fiber(op.axes))
        if n > 2 and sum(x.nbytes for x in xs) > ONE_HOP:
            return self._two_hops(op, xs, n)
        parts = [[x] * n for x in xs]
        exchange = Exchange(self, op, [])
        for source, sender, _, receiver in self._peers(op):
            for x, part in zip(xs, parts, strict=True):
                part[source] = self.buffers.take(x.shape, x)
                exchange.receive(part[source], sender)
                exchange.send(x, receiver)
        return Then(exchange, lambda _: [ordered_sum(part) for part in parts])

    def _two_hops(self, op: Op, xs: list[Tensor], n: int) -> Work:
        """Sum a slice each, then gather the slices: less to send when there are many ranks."""
        flat = [torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % n)) for x in xs]
        scattered = self._reduce_scatter(Op("reduce_scatter", op.axes), flat)

        def gather(sums: list[Tensor]) -> list[Tensor]:
            whole = self._all_gather(Op("all_gather", op.axes), sums).wait()
            return [y[: x.numel()].view(x.shape) for x, y in zip(xs, whole, strict=True)]

        return Then(scattered, gather)

    def _all_to_all(self, op: Op, xs: list[Tensor]) -> Work:
        me = self.index(op.axes)
        out = [x.new_empty(sum(op.receive), *x.shape[1:]) for x in xs]
        sends = [x.split(op.send) for x in xs]
        receives = [y.split(op.receive) for y in out]
        exchange = Exchange(self, op, out)
        for source, sender, target, receiver in self._peers(op):
            for s, r in zip(sends, receives, strict=True):
                exchange.receive(r[source], sender)
                exchange.send(s[target], receiver)
        for s, r in zip(sends, receives, strict=True):
            r[me].copy_(s[me])
        return exchange
