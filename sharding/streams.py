"""Random streams: where they stand, and putting them there again; and the stream of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def stand() -> list[Tensor]:
    """Where the default generators stand: the CPU's and, where it is in use, the current GPU's.

    >>> before = stand()
    >>> x = torch.rand(2)
    >>> put(before)
    >>> torch.equal(torch.rand(2), x)
    True
    """
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def put(states: list[Tensor]) -> None:
    """Let the default generators stand where they did."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


@contextmanager
def standing(states: list[Tensor]) -> Iterator[None]:
    """While this is active, the default generators stand there; then where they stood before."""
    before = stand()
    put(states)
    try:
        yield
    finally:
        put(before)


def current_stream() -> torch.cuda.Stream | None:
    """Where this thread's work on its GPU goes, if there is one in use; other threads begin anew.

    >>> current_stream() is None or torch.cuda.is_initialized()
    True
    """
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def go_on(stream: torch.cuda.Stream | None) -> None:
    """Let this thread's work go on that stream, and be on its GPU."""
    if stream is not None:
        torch.cuda.set_stream(stream)
