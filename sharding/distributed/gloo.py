"""Links between hosts: gloo's messages. A large tensor has its own, small ones share one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharding.buffers import Buffers
from sharding.distributed.parcel import Layout, Parcel

SMALL = 1 << 20  # bytes up to which copying a tensor is cheaper than a message of its own


class GlooLink:
    """Messages to and from ``peer`` through the process group."""

    def __init__(self, peer: int, timeout: float, buffers: Buffers) -> None:
        self.peer, self.buffers = peer, buffers
        self.patience = timedelta(seconds=timeout)

    def send(self, parcel: Parcel) -> Messages:
        alone, together = _sorted(parcel.xs)
        messages = [parcel.xs[i] for i in alone]
        if together:
            small = Parcel([parcel.xs[i] for i in together], b"")
            messages.append(torch.empty(small.nbytes, dtype=torch.uint8))
            small.write(messages[-1])
        return Messages([dist.isend(x, self.peer) for x in messages], messages, self.patience)

    def receive(self, like: Sequence[Tensor], into: bool, about: bytes) -> GlooArrival:
        return GlooArrival(self, like, into)

    def close(self) -> None:
        """The process group is not ours to end."""


class Messages:
    """Messages under way, and the memory that must outlive them."""

    def __init__(self, works: list[Any], memory: list[Tensor], patience: timedelta) -> None:
        self.works, self.memory, self.patience = works, memory, patience

    def wait(self) -> None:
        while self.works:
            self.works.pop(0).wait(self.patience)


class GlooArrival:
    """Receives from the moment it is made."""

    def __init__(self, link: GlooLink, like: Sequence[Tensor], into: bool) -> None:
        self.alone, self.together = _sorted(like)
        self.out = list(like)
        self.into = into
        if not into:
            for i in self.alone:
                self.out[i] = link.buffers.take(like[i].shape, like[i])
        messages = [self.out[i] for i in self.alone]
        self.small = Layout([like[i] for i in self.together])
        if self.together:
            messages.append(torch.empty(self.small.nbytes, dtype=torch.uint8))
        works = [dist.irecv(x, link.peer) for x in messages]
        self.messages = Messages(works, messages, link.patience)

    def wait(self) -> list[Tensor]:
        self.messages.wait()
        if self.together:
            arrived = self.small.read(self.messages.memory[-1])
            for i, x in zip(self.together, arrived, strict=True):
                self.out[i] = self.out[i].copy_(x) if self.into else x
        return self.out

    def release(self) -> None:
        # Nobody may ask for the result, but its memory may go only after the messages have.
        self.messages.wait()


def _sorted(xs: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Positions of tensors with a message of their own, and of those that share one."""
    small = [i for i, x in enumerate(xs) if x.nbytes <= SMALL]
    if len(small) < 2:
        return [i for i, x in enumerate(xs) if x.numel()], []
    return [i for i, x in enumerate(xs) if x.nbytes > SMALL], [i for i in small if xs[i].numel()]
