"""Link: parcels to and from one other rank. What a collective needs to know of a transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sharding.distributed.parcel import Parcel


class Mismatch(RuntimeError):
    """The other rank has sent, but not what this one awaits."""


class Arrival(Protocol):
    """A parcel that is awaited."""

    def wait(self) -> list[Tensor]:
        """Its tensors, to be read until it is released.

        Raises:
            RuntimeError: the other rank does not send, or is gone.
            Mismatch: it has sent something else.
        """
        ...

    def release(self) -> None:
        """The tensors are not read any more. Without ``wait``: nobody asks for them."""
        ...


class Sending(Protocol):
    """A parcel on its way; its tensors must not change before it has left."""

    def wait(self) -> None:
        """Until it has left.

        Raises:
            RuntimeError: the other rank does not take it, or is gone.
        """
        ...


class Link(Protocol):
    """Parcels to and from one other rank, received in the order in which they are sent."""

    def send(self, parcel: Parcel) -> Sending | None:
        """Send; None if the parcel has left."""
        ...

    def receive(self, like: Sequence[Tensor], into: bool, about: bytes) -> Arrival:
        """Await a parcel of tensors like these, to be written into them if ``into``."""
        ...

    def gone(self) -> str:
        """How it is known that the other rank has gone; nothing if it is not known."""
        ...

    def close(self) -> None:
        """Give back what the link holds."""
        ...
