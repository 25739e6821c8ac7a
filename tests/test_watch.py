"""Watches without ranks: the table through a store, what has not completed, and what it costs."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import pytest
import torch.distributed as dist

from sharding import Divergence, Mesh
from sharding.distributed import watch
from sharding.distributed.overdue import Overdue
from sharding.distributed.watch import SILENT, UNKNOWN, Watch
from sharding.divergence import table
from sharding.place import Place


class Transfer:
    """Stands in for NCCL's work."""

    def __init__(self) -> None:
        self.completed = False

    def is_completed(self) -> bool:
        return self.completed


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watch]]:
    """Makes the watch of a rank of three, which meet in one store."""
    monkeypatch.setattr(watch, "ANSWER", 0.5)
    store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    made: list[Watch] = []

    def make(rank: int, **options: Any) -> Watch:
        made.append(Watch(Place(), rank, 3, store.clone(), **options))
        return made[-1]

    yield make
    for each in made[::-1]:
        each.close("the end of the test")


def test_all_that_ask_at_a_time_get_the_same_table(watches: Any) -> None:
    three = [watches(rank, more=lambda rank=rank: f" as {rank}") for rank in range(3)]
    found: list[list[str]] = []
    asking = [Thread(target=lambda each=each: found.append(each.states({}))) for each in three]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert found == [found[0]] * 3
    assert [text.split(" s as ")[1][0] for text in found[0]] == ["0", "1", "2"]


def test_a_rank_that_asks_later_gets_the_first_table(watches: Any) -> None:
    three = [watches(rank) for rank in range(3)]
    three[1].place.begin(4)
    first = three[0].states({})
    three[1].place.begin(5)
    assert "in step 4, has started no collective" in first[1]
    assert three[1].states({}) == first


def test_who_does_not_answer_or_has_left_is_named(watches: Any) -> None:
    first, second = watches(0), watches(1)
    second.close("KeyError('unheard of')")
    begun = time.monotonic()
    states = first.states({})
    assert states[1].startswith("has ended with KeyError('unheard of'), after has started no")
    assert states[2] == SILENT
    assert 0.5 <= time.monotonic() - begun < 2.0


def test_nobody_waits_for_a_rank_that_has_gone(watches: Any) -> None:
    first, _ = watches(0), watches(1)
    begun = time.monotonic()
    assert first.states({2: "its host is down"})[2] == "has gone: its host is down"
    assert time.monotonic() - begun < 0.4


def test_a_store_that_does_not_answer_is_not_waited_for(
    watches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, cut_off = watches(0), Event()

    class Store:
        def set(self, *_: object) -> None:
            cut_off.wait()
            raise RuntimeError("broken pipe")

    monkeypatch.setattr(watch, "MARGIN", 0.2)
    monkeypatch.setattr(first, "store", Store())
    here, gone, unknown = first.states({1: "its host is down"})
    assert "has started no collective" in here
    assert gone == "has gone: its host is down" and unknown == UNKNOWN
    cut_off.set()


def test_a_watch_that_nobody_asks_costs_nothing(watches: Any) -> None:
    for rank in range(3):
        watches(rank)

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    time.sleep(2.0)
    assert spent() - before < 0.01, "of two seconds, for three watches and this thread"


# -- collectives that do not complete ------------------------------------------------------------


def test_a_collective_that_does_not_complete_is_reported_and_raised(
    watches: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = Mesh(ep=3)
    watched: list[Watch] = []

    def report(problem: str) -> Divergence:
        return Divergence(table(problem, mesh, watched[0].states({})))

    late = [Overdue(timeout, report) for timeout in (0.4, 60.0, 60.0)]
    watched += [watches(rank, more=late[rank].__str__) for rank in range(3)]
    done, stuck = Transfer(), Transfer()
    done.completed = True
    for rank in range(3):
        late[rank].launched("edp", done, lambda: "its collective no. 1")
        late[rank].launched("ep", stuck if rank < 2 else done, lambda: "its collective no. 2")
    late[0].check()  # not yet
    late[0].thread.join(5.0)
    with pytest.raises(Divergence, match=r"its collective no. 2; it has not completed within 0.4"):
        late[0].check()
    message = str(late[0].error)
    assert message in capsys.readouterr().err, "the host may never come to its next collective"
    assert message.count("; not completed for 0.") == 2
    assert "rank 1 {'ep': 1}: has started no collective" in message
    assert "no. 1" not in message
    for each in late:
        each.close()


def test_what_has_completed_is_let_go() -> None:
    late = Overdue(0.2, lambda problem: Divergence(problem))
    for completed in (True, False):
        transfer = Transfer()
        transfer.completed = completed
        late.launched(completed, transfer, str)
    time.sleep(0.15)
    assert list(late.last) == [False]
    late.last[False][0].completed = True  # pyright: ignore[reportAttributeAccessIssue]
    time.sleep(0.4)
    assert not late.last and late.error is None
    late.close()
