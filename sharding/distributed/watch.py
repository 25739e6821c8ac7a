"""Watch: how real ranks that part ways come to know where all of them stand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from threading import Thread, current_thread
from time import monotonic, sleep
from typing import Any

import torch.distributed as dist

from sharding.divergence import where
from sharding.place import Place

ANSWER = 3.0  # seconds that a rank has to say where it stands
MARGIN = 2.0  # seconds more for the table to be made and sent
LOOK = 0.01  # seconds between two looks at who has answered
LONG = timedelta(days=20)  # the store counts milliseconds in 32 bits
SILENT = f"no answer within {ANSWER:g} s: it has gone, or is stopped"
UNKNOWN = "unknown: the store of the process group does not answer (does the host of rank 0 live?)"


class Watch:
    """A thread that says where its rank stands when another rank asks, whatever the rank does.

    It sleeps in the store of the process group until then, and costs nothing. The first rank that
    asks makes the table, and all others take it over. Asking takes at most ``ANSWER + MARGIN``:
    where the store has gone with its host, a rank knows of itself only.

    Args:
        place: where this rank stands.
        rank: its number.
        world: how many ranks there are; all of them make their watches in the same order.
        store: of the process group.
        more: what else to say of this rank, if anything.
    """

    def __init__(
        self,
        place: Place,
        rank: int,
        world: int,
        store: dist.Store,
        more: Callable[[], str] = lambda: "",
    ) -> None:
        self.place, self.rank, self.world, self.more = place, rank, world, more
        number = store.add(f"watches of rank {rank}", 1)
        self.store = dist.PrefixStore(f"watch {number}", store)
        self.owner = current_thread()
        self.heard: dict[int, str] = {}
        self.table: list[str] | None = None  # the first that was made, the same on every rank
        self.closed = False
        # A connection of its own: while one thread waits in a store, no other can use it.
        listening: dist.Store = self.store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.thread = Thread(target=self._answer, args=(listening,), name="watch", daemon=True)
        self.thread.start()

    def close(self, how: str = "") -> None:
        """This rank leaves; later tables will say so, and ``how`` if something went wrong."""
        if self.closed:  # or a forked child: its parent has not left
            return
        self.closed = True
        self._act(self._leave, how)
        self.thread.join(LOOK if self.table else MARGIN)

    def states(self, gone: Mapping[int, str]) -> list[str]:
        """Where each rank stands, or stood when the first of them asked.

        Args:
            gone: ranks that cannot answer any more, and how that is known.
        """
        if self.table is None:
            self._act(self._ask, gone)
        known = {r: f"has gone: {how}" for r, how in gone.items()} | self.heard
        return self.table or [known.get(r, UNKNOWN) for r in range(self.world)]

    def _act(self, act: Callable[[Any], None], argument: Any) -> None:
        """Act in another thread, since a store whose host is cut off may never return."""

        def attempt() -> None:
            with suppress(RuntimeError):
                act(argument)

        acting = Thread(target=attempt, name="watch", daemon=True)
        acting.start()
        acting.join(ANSWER + MARGIN)

    def _leave(self, how: str) -> None:
        ending = f"has ended with {how}" if how else "has left"
        self.store.set(f"place {self.rank}", f"{ending}, after {self.place}")
        self.store.set(f"wake {self.rank}", "closed")
        left = self.store.add("left", 1)
        until = monotonic() + MARGIN
        while self.rank == 0 and not how and left < self.world and monotonic() < until:
            sleep(LOOK)  # the store may be ours, and the others still sleep in it
            left = self.store.add("left", 0)

    def _ask(self, gone: Mapping[int, str]) -> None:
        self.heard[self.rank] = self._here()
        self.store.set(f"place {self.rank}", self.heard[self.rank])
        if self.store.add("asked", 1) == 1 or not self._take_over(self.store):
            self._collect(gone)

    def _collect(self, gone: Mapping[int, str]) -> None:
        """Wake all ranks, and make the table of what they say."""
        missing = [r for r in range(self.world) if r != self.rank]
        for r in missing:
            self.store.set(f"wake {r}", "asked")
        until = monotonic() + ANSWER
        while True:
            for r in [r for r in missing if self.store.check([f"place {r}"])]:
                self.heard[r] = self.store.get(f"place {r}").decode()
                missing.remove(r)
            if set(missing) <= set(gone) or monotonic() > until:
                break
            sleep(LOOK)
        for r in missing:
            self.heard[r] = f"has gone: {gone[r]}" if r in gone else SILENT
        table = [self.heard[r] for r in range(self.world)]
        self.store.set("table", json.dumps(table))
        self.table = table

    def _answer(self, store: dist.Store) -> None:
        """What the thread does: sleep, say where this rank stands, and hear of the others."""
        with suppress(RuntimeError):
            self._sleep(store)
            if not self.closed:
                store.set(f"place {self.rank}", self._here())
                self._take_over(store)

    def _sleep(self, store: dist.Store) -> None:
        while True:
            with suppress(dist.DistStoreError):  # nobody has asked for so long
                store.wait([f"wake {self.rank}"], LONG)
                return

    def _take_over(self, store: dist.Store) -> bool:
        """The table of the rank that asked first, unless that one has gone."""
        with suppress(dist.DistStoreError):
            store.wait(["table"], timedelta(seconds=ANSWER + MARGIN / 2))
            self.table = json.loads(store.get("table"))
        return self.table is not None

    def _here(self) -> str:
        return f"{self.place}{self.more()}{where(self.owner)}"
