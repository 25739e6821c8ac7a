"""Overdue: collectives that do not complete, where awaiting them does not make the host wait."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from threading import Event, Thread
from time import monotonic
from typing import Protocol

from sharding.comm import Divergence

LOOK = 1.0  # seconds between two looks


class Transfer(Protocol):
    """What a backend returns of a collective that it has launched."""

    def is_completed(self) -> bool:
        """Whether the device has finished it; does not wait."""
        ...


class Overdue:
    """A thread that looks once a second whether the last collective of each group has completed.

    Those of a group complete in order: if any of them is stuck, so is the last. One that takes
    longer than ``timeout`` is reported once: on stderr, for the host may never come to its next
    collective, and by ``check`` there.

    Args:
        timeout: seconds that a collective may take.
        report: the error to be raised, given what is wrong.
    """

    def __init__(self, timeout: float, report: Callable[[str], Divergence]) -> None:
        self.timeout, self.report = timeout, report
        self.last: dict[Hashable, tuple[Transfer, Callable[[], str], float]] = {}
        self.error: Divergence | None = None
        self.closed = Event()
        self.thread = Thread(target=self._look, name="overdue", daemon=True)
        self.thread.start()

    def launched(self, group: Hashable, transfer: Transfer, what: Callable[[], str]) -> None:
        """The last collective of a group, and how to call it."""
        self.last[group] = transfer, what, monotonic()

    def check(self) -> None:
        """Raise what has been found."""
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """Look no more."""
        self.closed.set()
        self.thread.join()

    def __str__(self) -> str:
        """What has not completed yet, as the end of a sentence."""
        now = monotonic()
        return "".join(
            f"; not completed for {now - since:.1f} s: {what()}"
            for transfer, what, since in list(self.last.values())
            if not transfer.is_completed()
        )

    def _look(self) -> None:
        while self.error is None and not self.closed.wait(min(LOOK, self.timeout / 4)):
            for group, launched in list(self.last.items()):
                transfer, what, since = launched
                if transfer.is_completed():
                    if self.last.get(group) is launched:  # its memory is not ours to keep
                        self.last.pop(group, None)
                elif monotonic() - since > self.timeout and self.error is None:
                    problem = f"it has not completed within {self.timeout:g} s"
                    self.error = self.report(f"{what()}; {problem}")
                    print(self.error, file=sys.stderr, flush=True)
