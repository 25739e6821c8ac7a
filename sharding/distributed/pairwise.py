"""Ranks on CPU: every collective is an exchange of parcels between pairs of ranks.

Slices travel straight from the input into the slices of the output, or are added where they lie;
gloo's own all-gather and reduce-scatter move each byte several times.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from sharding.buffers import Buffers
from sharding.comm import Op, Then, Work
from sharding.distributed.gloo import GlooLink
from sharding.distributed.link import Arrival, Link, Mismatch, Sending
from sharding.distributed.meet import meet
from sharding.distributed.parcel import Parcel, about, kinds_of
from sharding.distributed.ranks import DistributedComm
from sharding.distributed.segments import Outbox
from sharding.distributed.shared import SharedLink
from sharding.mesh import Mesh
from sharding.plain import outside_transforms
from sharding.specification import ordered_sum

ONE_HOP = 1 << 18  # bytes up to which an all-reduce sends everything to everyone at once

T = TypeVar("T")
Parts = dict[int, list[Tensor]]  # what has come, by the sender's place in the fiber


class Exchange:
    """A collective under way: what goes to and comes from each of the others of its fiber."""

    def __init__(self, comm: PairwiseComm, op: Op, xs: Sequence[Tensor]) -> None:
        self.sent: list[tuple[int, Sending]] = []
        self.awaited: dict[int, tuple[int, Arrival]] = {}
        self.comm, self.op, self.kinds = comm, op, kinds_of(op, xs)
        self.about = about(op, self.kinds)
        self.finish: Callable[[Parts], list[Tensor]] = lambda _: []
        self.number = comm.place.start(op, self.kinds)

    def send(self, parcel: Parcel, peer: int) -> None:
        sending = self._attempt(peer, lambda: self.comm.links[peer].send(parcel))
        if sending is not None:
            self.sent.append((peer, sending))

    def receive(self, like: Sequence[Tensor], place: int, peer: int, into: bool = False) -> None:
        link = self.comm.links[peer]
        arrival = self._attempt(peer, lambda: link.receive(like, into, self.about))
        self.awaited[place] = peer, arrival

    def wait(self) -> list[Tensor]:
        here = self.comm.place
        here.wait(self.number, self.op, self.kinds)
        with outside_transforms():
            parts = {
                place: self._attempt(peer, arrival.wait)
                for place, (peer, arrival) in self.awaited.items()
            }
            result = self.finish(parts)
            for peer, sending in self.sent:
                self._attempt(peer, sending.wait)
            self._release()
        here.go_on(self.number, self.op, self.kinds)
        return result

    def _release(self) -> None:
        while self.awaited:
            _, (peer, arrival) = self.awaited.popitem()
            self._attempt(peer, arrival.release)
        self.sent = []

    def __del__(self) -> None:
        # Nobody asked for the result: of a view fetched ahead of a backward pass that ended early.
        # Memory may be collected in the middle of anything, so this is left for the next transfer.
        if self.sent or self.awaited:
            arrivals = [arrival for _, arrival in self.awaited.values()]
            self.comm.abandoned.append(([sending for _, sending in self.sent], arrivals))

    def _attempt(self, peer: int, act: Callable[[], T]) -> T:
        try:
            return act()
        except (RuntimeError, OSError) as error:
            self.comm.unsettled += self.sent  # what has been said, others may still want to hear
            self.sent, self.awaited = [], {}
            gone = {r: how for r, link in self.comm.links.items() if (how := link.gone())}
            raise self.comm.parted(self._describe(peer, error), gone) from error

    def _describe(self, peer: int, error: Exception) -> str:
        comm, mesh = self.comm, self.comm.mesh
        other = f"rank {peer} {mesh.coords(peer)}"
        if isinstance(error, Mismatch):
            problem = f"{other} has sent something else: {error}"
        elif isinstance(error, ConnectionError):
            problem = f"{other} has gone ({error}): see its own error, if it has printed one"
        else:
            problem = f"{other} did not join it within {comm.timeout:g} s ({error})"
        this = comm.place.collective(self.number, self.op, self.kinds)
        return f"rank {comm.rank} {comm.coords} is at {this}; {problem}."


class PairwiseComm(DistributedComm):
    """Collectives as parcels between pairs of ranks: in shared memory on a host, else by gloo."""

    def __init__(self, mesh: Mesh, rank: int, timeout: float, device: torch.device) -> None:
        super().__init__(mesh, rank, timeout, device)
        self.buffers, self.outbox = Buffers(), Outbox()
        self.abandoned: list[tuple[list[Sending], list[Arrival]]] = []
        self.unsettled: list[tuple[int, Sending]] = []  # when ranks parted ways
        near = meet(rank, mesh.size, timeout)
        self.links: dict[int, Link] = {
            peer: SharedLink(peer, near[peer], self.outbox, timeout)
            if peer in near
            else GlooLink(peer, timeout, self.buffers)
            for peer in mesh
            if peer != rank
        }

        shared = [link for link in self.links.values() if isinstance(link, SharedLink)]
        for link in shared:
            link.neighbours = shared
        _close_in_children(self)

    def close(self, how: str = "") -> None:
        if not how:
            with suppress(RuntimeError, OSError):
                self._settle()
        super().close(how)
        self.let_go()

    def let_go(self) -> None:
        """Give back what the links hold."""
        for link in self.links.values():
            link.close()
        self.outbox.close()

    def _settle(self) -> None:
        """See transfers off that nobody awaits any more."""
        while self.abandoned:
            sent, arrivals = self.abandoned.pop()
            for sending in sent:
                sending.wait()
            for arrival in arrivals:
                arrival.release()

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        self._settle()
        xs = [x.detach().contiguous() for x in xs]
        if op.kind == "all_gather":
            return self._all_gather(op, xs)
        if op.kind == "reduce_scatter":
            return self._reduce_scatter(op, xs)
        if op.kind == "all_reduce":
            return self._all_reduce(op, xs)
        return self._all_to_all(op, xs)

    def _peers(self, op: Op) -> Iterator[tuple[int, int]]:
        """The others of the fiber, place and rank, each rank beginning with its neighbour."""
        fiber, me = self.fiber(op.axes), self.index(op.axes)
        for d in range(1, len(fiber)):
            place = (me + d) % len(fiber)
            yield place, fiber[place]

    def _all_gather(self, op: Op, xs: list[Tensor]) -> Work:
        n, me = len(self.fiber(op.axes)), self.index(op.axes)
        out = [self.buffers.take((n * len(x), *x.shape[1:]), x) for x in xs]
        slices = [y.view(n, *x.shape) for x, y in zip(xs, out, strict=True)]
        exchange = Exchange(self, op, xs)
        parcel = Parcel(xs, exchange.about)
        for place, peer in self._peers(op):
            exchange.receive([y[place] for y in slices], place, peer, into=True)
            exchange.send(parcel, peer)
        torch._foreach_copy_([y[me] for y in slices], xs)
        exchange.finish = lambda _: out
        return exchange

    def _reduce_scatter(self, op: Op, xs: list[Tensor]) -> Work:
        n, me = len(self.fiber(op.axes)), self.index(op.axes)
        slices = [x.view(n, len(x) // n, *x.shape[1:]) for x in xs]
        mine = [s[me] for s in slices]
        exchange = Exchange(self, op, xs)
        for place, peer in self._peers(op):
            exchange.receive(mine, place, peer)
            exchange.send(Parcel([s[place] for s in slices], exchange.about), peer)
        exchange.finish = lambda parts: self._sums(parts | {me: mine})
        return exchange

    def _all_reduce(self, op: Op, xs: list[Tensor]) -> Work:
        n, me = len(self.fiber(op.axes)), self.index(op.axes)
        if n > 2 and sum(x.nbytes for x in xs) > ONE_HOP:
            return self._two_hops(op, xs, n)
        exchange = Exchange(self, op, xs)
        parcel = Parcel(xs, exchange.about)
        for place, peer in self._peers(op):
            exchange.receive(xs, place, peer)
            exchange.send(parcel, peer)
        exchange.finish = lambda parts: self._sums(parts | {me: xs})
        return exchange

    def _sums(self, parts: Parts) -> list[Tensor]:
        """The sum over the fiber, in its order, of each tensor."""
        columns = zip(*(parts[place] for place in sorted(parts)), strict=True)
        return [ordered_sum(xs, self.buffers.take(xs[0].shape, xs[0])) for xs in columns]

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
        exchange = Exchange(self, op, xs)
        for place, peer in self._peers(op):
            exchange.receive([r[place] for r in receives], place, peer, into=True)
            exchange.send(Parcel([s[place] for s in sends], exchange.about), peer)
        torch._foreach_copy_([r[me] for r in receives], [s[me] for s in sends])
        exchange.finish = lambda _: out
        return exchange


def _close_in_children(comm: PairwiseComm) -> None:
    """A forked child (of a data loader) must not hold the sockets of a rank that has died open."""
    known = weakref.ref(comm)

    def close() -> None:
        comm = known()
        if comm is not None:
            comm.watch.closed = True
            comm.let_go()

    os.register_at_fork(after_in_child=close)
