"""Two processes that save to one path: each save is whole or refused, and damages no other."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from disks import Faulty, MemoryDisk
from states import a_plan, state_of

from functional_ep import Checkpoints, save
from functional_ep.checkpoint import committed, verify
from functional_ep.checkpoint.disk import DISK, Disk
from functional_ep.checkpoint.folder import discard, tidy
from sharding import Comm, Mesh, simulate, zero3

PLAN = a_plan(Mesh(ep=2), dict.fromkeys(("expert", "dense", "still"), zero3("ep")))
BUSY = "another process is saving to {}: wait for it, or choose another path"


class NoLock(Disk):
    """Locks that keep nobody out."""

    def lock(self, path: Path) -> int:
        return -1

    def unlock(self, lock: int) -> None: ...


class Gate(Disk):
    """A disk that writes nothing as long as its gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def write(self, file: int, memory: memoryview) -> None:
        assert self.gate.wait(20)
        super().write(file, memory)


def save_one(path: Path, step: int, disk: Disk = DISK) -> None:
    def program(comm: Comm) -> None:
        save(path, state_of(PLAN, comm.rank, step), PLAN, comm, disk=disk)

    simulate(program, PLAN.mesh)


def keep_one(directory: Path, step: int, disk: Disk = DISK) -> None:
    def program(comm: Comm) -> None:
        with Checkpoints(directory, PLAN, comm, keep=1, disk=disk) as checkpoints:
            checkpoints.save(state_of(PLAN, comm.rank, step))

    simulate(program, PLAN.mesh)


# -- two processes ---------------------------------------------------------------------------------

Tally = tuple[int, int, list[str]]  # saves that were made, saves that were refused, what was wrong


def damage(path: Path) -> list[str]:
    try:
        return [str(problem) for problem in verify(path).problems]
    except (OSError, ValueError) as error:
        return [str(error)]


def hammer(path: Path, first: int, disk: Disk, seconds: float, start: Any, tallies: Any) -> None:
    """Save again and again; every refusal has to say why, and every other error is wrong."""
    made, refused, wrong = 0, 0, list[str]()
    start.wait()
    end = monotonic() + seconds
    while monotonic() < end:
        try:
            save_one(path, first + made, disk)
            made += 1
        except BlockingIOError as error:
            refused += 1
            wrong += [] if str(error).endswith(BUSY.format(path)) else [str(error)]
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
    tallies.put((made, refused, wrong))


def hammered(path: Path, disk: Disk, seconds: float) -> tuple[list[Tally], list[str]]:
    context = multiprocessing.get_context("spawn")
    start, tallies = context.Barrier(2), context.Queue()
    both = [
        context.Process(target=hammer, args=(path, first, disk, seconds, start, tallies))
        for first in (1, 10**6)
    ]
    for process in both:
        process.start()
    found = [tallies.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    return found, damage(path)


def test_saves_of_two_processes_to_one_path_are_whole_or_refused(tmp_path: Path) -> None:
    tallies, problems = hammered(tmp_path / "one", DISK, 3)
    assert not problems
    for made, _, wrong in tallies:
        assert made and not wrong
    assert sum(refused for _, refused, _ in tallies), "they never met"
    names = set(os.listdir(tmp_path / "one"))
    assert len(names) == 5 and "manifest.json" in names, "something was left"


def test_locks_that_keep_nobody_out_are_found(tmp_path: Path) -> None:
    tallies, problems = hammered(tmp_path / "one", NoLock(), 2)
    assert problems or any(wrong for _, _, wrong in tallies)


# -- one that holds the lock -----------------------------------------------------------------------


def held(path: Path) -> int:
    """The lock of another open file, as another process would have it."""
    file = os.open(path, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def content(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refusal(act: Any, path: Path, disk: Disk = DISK) -> str:
    """What all ranks say alike."""

    def program(comm: Comm) -> str:
        try:
            act(comm, disk)
        except BlockingIOError as error:
            return str(error)
        return ""

    first, second = simulate(program, PLAN.mesh)
    assert first == second
    return first.removeprefix("rank 0: ")


def refused_save(path: Path, disk: Disk = DISK) -> str:
    def act(comm: Comm, disk: Disk) -> None:
        save(path, state_of(PLAN, comm.rank, 3), PLAN, comm, disk=disk)

    return refusal(act, path, disk)


def refused_checkpoint(directory: Path, disk: Disk = DISK) -> str:
    def act(comm: Comm, disk: Disk) -> None:
        with Checkpoints(directory, PLAN, comm, keep=1, disk=disk) as checkpoints:
            checkpoints.save(state_of(PLAN, comm.rank, 3))

    return refusal(act, directory, disk)


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "again"])
def test_while_another_saves_a_save_is_refused_and_changes_nothing(
    before: bool, tmp_path: Path
) -> None:
    path = tmp_path / "one"
    if before:
        save_one(path, 1)
    path.mkdir(exist_ok=True)
    (path / ".rank-00000.incomplete").write_bytes(b"of the other")
    (path / f"rank-00000-{'0' * 32}.safetensors").write_bytes(b"of the other")
    was, lock = content(path), held(path)
    assert refused_save(path) == BUSY.format(path) and content(path) == was
    assert refused_save(path, NoLock()) == "" and content(path) != was, "the lock did nothing"
    os.close(lock)
    save_one(path, 4)
    assert not damage(path)


def test_while_another_keeps_checkpoints_there_none_is_made_and_none_goes(tmp_path: Path) -> None:
    keep_one(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / ".rank-00000.incomplete").write_bytes(b"of the other")
    was, lock = content(tmp_path), held(tmp_path)
    assert refused_checkpoint(tmp_path) == BUSY.format(tmp_path) and content(tmp_path) == was
    os.close(lock)
    keep_one(tmp_path, 3)
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_one_save_of_another_in_the_directory_is_neither_tidied_nor_discarded(
    tmp_path: Path,
) -> None:
    growing, whole = tmp_path / "step-00000001", tmp_path / "step-00000002"
    growing.mkdir()
    (growing / ".rank-00000.incomplete").write_bytes(b"of the other")
    save_one(whole, 2)
    was, locks = content(tmp_path), [held(growing), held(whole)]
    tidy(tmp_path, DISK)
    with pytest.raises(BlockingIOError, match="another process is saving to"):
        discard(whole, DISK)
    assert content(tmp_path) == was
    keep_one(tmp_path, 3)
    assert was.items() <= content(tmp_path).items()
    for lock in locks:
        os.close(lock)
    keep_one(tmp_path, 4)
    assert os.listdir(tmp_path) == ["step-00000004"]


@pytest.mark.parametrize("ends", ["wait", "error", "forgotten"])
def test_a_save_under_way_holds_its_directory_until_it_ends(ends: str, tmp_path: Path) -> None:
    disk = Gate()

    def program(comm: Comm) -> None:
        checkpoints = Checkpoints(tmp_path, PLAN, comm, disk=disk)
        checkpoints.save(state_of(PLAN, comm.rank, 1))
        if comm.rank == 0:
            for path in (tmp_path, tmp_path / "step-00000001"):
                with pytest.raises(BlockingIOError):
                    held(path)
            disk.gate.set()
        comm.all_reduce([torch.ones(1)], comm.mesh.axes)
        if ends == "wait":
            checkpoints.wait()
        elif ends == "error":
            checkpoints.__exit__(KeyError, KeyError(), None)
        else:
            checkpoints._pending.join()  # pyright: ignore[reportOptionalMemberAccess]

    simulate(program, PLAN.mesh)
    keep_one(tmp_path, 2)
    assert [path.name for path in committed(tmp_path)][-1] == "step-00000002"


# -- a real disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOTSUP, errno.EBADF, errno.ENOLCK])
def test_where_there_are_no_locks_it_saves_without(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    save_one(tmp_path / "one", 1)
    keep_one(tmp_path / "many", 1)
    assert not damage(tmp_path / "one") and not damage(tmp_path / "many" / "step-00000001")


def test_the_lock_of_a_directory_that_was_replaced_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / "one", fcntl.flock
    path.mkdir()

    def late(file: int, how: int) -> None:
        path.rmdir()
        path.mkdir()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BlockingIOError):
        DISK.lock(path)


def test_what_cannot_be_removed_after_the_moment_is_no_error_and_goes_later() -> None:
    path, inner = Path("/one"), MemoryDisk()
    save_one(path, 1, inner)
    counting = Faulty(inner)
    save_one(path, 2, counting)
    moment = counting.done.index(f"rename {path}/manifest.json")
    removals = [i for i, what in enumerate(counting.done) if what.startswith("remove")]
    assert removals and min(removals) > moment + 1
    for at in removals:
        disk = MemoryDisk()
        save_one(path, 1, disk)
        save_one(path, 2, Faulty(disk, at, errno.EIO))
        assert not verify(path, disk=disk).problems
        assert len(disk.names(path) or ()) > len(inner.names(path) or ()), "it was removed"
        save_one(path, 3, disk)
        assert len(disk.names(path) or ()) == len(inner.names(path) or ())
