"""Real ranks that part ways: an error in stated time, with a table of where each of them stands."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from farm import Farm, RankDied

from sharding import Comm, Divergence, Mesh, distributed
from sharding.distributed.gloo import GlooLink
from sharding.distributed.pairwise import PairwiseComm
from sharding.distributed.watch import ANSWER, MARGIN, SILENT, UNKNOWN

MESH = Mesh(edp=2, ep=2)
AXES = MESH.axes
PATIENCE = 2.0  # seconds that a rank waits for others
HOSTS = {"shared": [0, 0, 0, 0], "gloo": [0, 1, 2, 3], "mixed": [0, 0, 1, 1]}  # of each rank


# -- programs in which rank 2 parts ways ---------------------------------------------------------


def ones(n: int = 5) -> list[torch.Tensor]:
    return [torch.ones(n)]


def skips(comm: Comm) -> None:
    if comm.rank != 2:
        comm.all_reduce(ones(), AXES)
    comm.all_gather(ones(3), AXES)


def starts_another(comm: Comm) -> None:
    comm.all_reduce(ones(7 if comm.rank == 2 else 5), AXES)


def starts_a_larger_one(comm: Comm) -> None:
    comm.all_reduce(ones(700_000 if comm.rank == 2 else 600_000), AXES)


def swaps(comm: Comm) -> None:
    kinds = (comm.all_reduce, comm.all_gather)
    for act in kinds[::-1] if comm.rank == 2 else kinds:
        act(ones(), AXES)


def sends_other_rows(comm: Comm) -> None:
    splits = [0, 0, 4, 0] if comm.rank == 2 else [1, 1, 1, 1]
    comm.all_to_all([torch.ones(4, 3)], AXES, splits, splits)


def is_stopped(comm: Comm) -> None:
    (pids,) = comm.all_gather([torch.tensor([os.getpid()])], AXES)
    if comm.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        comm.all_reduce(ones(), AXES)
    finally:
        os.kill(int(pids[2]), signal.SIGCONT)


def is_stuck(comm: Comm) -> None:
    if comm.rank == 2:
        time.sleep(PATIENCE + 1)  # and then it joins
    comm.all_reduce(ones(), AXES)


def everyone_is_here(store: dist.Store, rank: int) -> None:
    store.set(f"rank {rank} is here", "")
    store.wait([f"rank {r} is here" for r in MESH])


def parting(
    program: Callable[[Comm], None], hosts: Sequence[int], rank: int, store: dist.Store
) -> tuple[str, float]:
    """Two steps, the second of which goes wrong: what this rank is told, and after how long.

    In a process group of its own, since messages stay under way.
    """
    dist.destroy_process_group()
    # the others may still be in the case before
    dist.init_process_group("gloo", store=store, rank=rank, world_size=MESH.size)
    begun = time.monotonic()
    try:
        with distributed(MESH, timeout=PATIENCE, device="cpu") as comm:
            assert isinstance(comm, PairwiseComm)
            near = dict(comm.links)
            for peer in near:
                if hosts[peer] != hosts[comm.rank]:
                    comm.links[peer] = GlooLink(peer, comm.timeout, comm.buffers)
            comm.at(6)
            comm.all_reduce(ones(), AXES)
            comm.all_gather(ones(), ("ep",))
            everyone_is_here(store, rank)  # or one might not have woken yet from these
            comm.at(7)
            begun = time.monotonic()
            try:
                program(comm)
            finally:
                comm.links = near
    except Divergence as error:
        return str(error), time.monotonic() - begun
    return "", time.monotonic() - begun


def in_turn(comm: Comm, cases: Sequence[tuple[Any, Any]]) -> list[tuple[str, float]]:
    """What this rank is told in each of the cases."""
    store = dist.distributed_c10d._get_default_store()
    return [
        parting(*case, comm.rank, dist.PrefixStore(f"case {i}", store))
        for i, case in enumerate(cases)
    ]


# -- the table -----------------------------------------------------------------------------------

# Of ranks that a mismatch is found on at once, some may not have come to wait, or so far.
AT_ONCE = r"in step [67], (waiting|computing) for \d\.\d s (in|since) its collective no\. [23]"
THIRD = r"in step 7, .* for \d\.\d s \w+ its collective no\. 3 \(no\. 1 of the step\), "
WAITS = r"in step 7, waiting for [2-4]\.\d s in its collective no\. {} \(no\. {} of the step\), "
STUCK = (
    r"in step 7, computing for [2-4]\.\d s since its collective no\. 2, "
    r"all_gather\(axes=\('ep',\)\) of \[float32\[5\]\]\n      in is_stuck \(test_desync.py:\d+\)"
)
PARTING: list[tuple[Callable[[Comm], None], str, str]] = [
    (skips, THIRD + r"all_gather\(axes=.*\) of \[float32\[3\]\]\n      in skips ", AT_ONCE),
    (starts_another, THIRD + r"all_reduce\(axes=.*\) of \[float32\[7\]\]", AT_ONCE),
    (starts_a_larger_one, THIRD + r"reduce_scatter\(axes=.*\) of \[float32\[700000\]\]", AT_ONCE),
    (swaps, THIRD + r"all_gather\(axes=.*\) of \[float32\[5\]\]", AT_ONCE),
    (sends_other_rows, THIRD + r"all_to_all\(.*send=\(0, 0, 4, 0\), .*\[float32\[3\]", AT_ONCE),
    (is_stuck, STUCK, WAITS.format(3, 1)),
    (is_stopped, re.escape(SILENT), WAITS.format(4, 2)),
]
WAITED_FOR = {"is_stuck": ["shared", "gloo"], "is_stopped": ["mixed"]}
CASES = [(row, hosts) for row in PARTING for hosts in WAITED_FOR.get(row[0].__name__, list(HOSTS))]
Told = dict[tuple[str, str], list[tuple[str, float]]]


@pytest.fixture(scope="module")
def told() -> Told:
    """What each rank is told in each of the cases."""
    programs = [(row[0], HOSTS[hosts]) for row, hosts in CASES]
    with Farm(4) as farm:
        found = farm.run(in_turn, MESH, [programs] * 4, timeout=120.0)
    return {
        (row[0].__name__, hosts): [rank[i] for rank in found]
        for i, (row, hosts) in enumerate(CASES)
    }


def rows(message: str) -> dict[int, str]:
    """What the table says of each rank."""
    found = re.findall(r"^  rank (\d) (\{.*?\}): (.*(?:\n      .*)?)", message, re.MULTILINE)
    assert [(int(r), place) for r, place, _ in found] == [(r, str(MESH.coords(r))) for r in MESH]
    return {int(r): text for r, _, text in found}


@pytest.mark.parametrize(
    ("row", "hosts"), CASES, ids=[f"{row[0].__name__}-{hosts}" for row, hosts in CASES]
)
def test_all_that_wait_are_told_where_each_rank_stands(told: Told, row: Any, hosts: str) -> None:
    program, of_rank_2, of_others = row
    messages, after = zip(*told[program.__name__, hosts], strict=True)
    waits = program.__name__ in WAITED_FOR
    waiting = [r for r in MESH if r != 2 or not waits]
    tables = [rows(messages[r]) for r in waiting]
    for table in tables:
        assert re.match(of_rank_2, table[2]), table[2]
        assert all(re.match(of_others, table[r]) for r in (0, 1, 3)), table
        assert table == tables[0], "ranks were told different things"
    silence = ANSWER if program is is_stopped else 0.0
    assert max(after) < (PATIENCE if waits else 0.0) + silence + MARGIN


# -- ranks that go away --------------------------------------------------------------------------


def dies(comm: Comm, rank: int, notes: Path) -> None:
    comm.at(1)
    comm.all_gather(ones(), ("ep",))
    if comm.rank == rank:
        os._exit(3)
    try:
        comm.all_reduce(ones(), ("ep",))
    except Divergence as error:
        (notes / str(comm.rank)).write_text(str(error))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_has_died_is_named_even_if_it_held_the_store(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.GRACE", ANSWER + MARGIN)
    with Farm(3) as farm, pytest.raises(RankDied, match=f"rank {rank} died"):
        farm.run(dies, Mesh(ep=3), [rank] * 3, [tmp_path] * 3)
    others = [r for r in range(3) if r != rank]
    for r in others:
        message = (tmp_path / str(r)).read_text()
        assert f"rank {rank} {{'ep': {rank}}} has gone (" in message
        assert f"  rank {rank} {{'ep': {rank}}}: has gone: its process has ended\n" in message
        for other in others:
            known = rank == 2 or other == r  # the store was rank 0's
            stands = "in step 1, " if known else UNKNOWN
            assert f"  rank {other} {{'ep': {other}}}: {stands}" in message
