"""Stopping in good order: a signal becomes a wish, which all ranks grant after the same step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from sharding import Comm
from sharding.collectives import psum

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run that was asked to stop has done so; what it came to is saved."""

    def __init__(self, wish: Wish, step: int, saved: Path | None) -> None:
        self.signal, self.step, self.saved = wish.signal, step, saved
        where = f"saved as {saved}; the same command goes on from there" if saved else "not saved"
        super().__init__(f"stopped after step {step}: {where}")


class Wish:
    """Whether this process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def granted(self, comm: Comm) -> bool:
        """Whether any rank has been asked to stop: the same answer on every rank."""
        asked = torch.tensor(int(self.signal is not None), device=comm.device)
        return bool(psum(asked, comm.mesh.axes, comm))


@contextmanager
def on_signals() -> Iterator[Wish]:
    """While this is active, SIGTERM and SIGINT make a wish; a second one ends the process at once.

    >>> import os
    >>> with on_signals() as wish:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     print(signal.Signals(wish.signal).name)
    SIGTERM
    """
    wish = Wish()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def make(number: int, frame: FrameType | None) -> None:
        wish.signal = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, make)
    try:
        yield wish
    finally:
        restore()
