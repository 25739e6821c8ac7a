"""Checkpoints of a training: written behind it, and no error of the writing is lost."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import Faulty, MemoryDisk
from farm import Farm
from states import LABELS, PARAMS, RULES, a_plan, same, state_of

from functional_ep import Checkpoints, State
from functional_ep.checkpoint import checkpoints as module
from functional_ep.checkpoint import committed, describe, verify
from functional_ep.checkpoint.disk import DISK, Disk
from functional_ep.checkpoint.parts import Buffers, on_cpu
from functional_ep.sealed import Damaged
from sharding import Comm, Mesh, make_plan, replicated, simulate
from sharding.tree import flatten

MESH = Mesh(edp=1, ep=2)
PLAN = a_plan(MESH)


class Gate(Disk):
    """A disk that writes nothing as long as its gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def write(self, file: int, memory: memoryview) -> None:
        assert self.gate.wait(20)
        super().write(file, memory)


class Full(Disk):
    """A disk that is full for one rank's payloads, as long as it is said to be."""

    def __init__(self, rank: int) -> None:
        self.rank, self.full = rank, True

    def create(self, path: Path) -> int:
        if self.full and f"rank-{self.rank:05}" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().create(path)


def on_ranks(program: Any) -> list[Any]:
    return simulate(program, MESH)


def names(directory: Path) -> list[str]:
    return [path.name for path in committed(directory)]


def test_training_goes_on_while_a_save_is_written_which_is_none_until_then(tmp_path: Path) -> None:
    disk = Gate()

    def program(comm: Comm) -> tuple[Any, ...]:
        checkpoints = Checkpoints(tmp_path, PLAN, comm, every=2, disk=disk)
        seen: list[Path | None] = []
        for step in (1, 2, 3):
            checkpoints(state_of(PLAN, comm.rank, step))
            seen.append(checkpoints.latest)
        disk.gate.set()
        checkpoints.wait()
        seen.append(checkpoints.latest)
        state = checkpoints.restore()
        assert checkpoints.last is not None and checkpoints.last.step == 2
        assert checkpoints.last.bytes > 0 and checkpoints.last.writing > 0
        return seen, same(state, state_of(PLAN, comm.rank, 2))

    for seen, is_right in on_ranks(program):
        assert seen == [None, None, None, tmp_path / "step-00000002"] and is_right


def test_a_save_commits_by_itself_when_all_ranks_have_written(tmp_path: Path) -> None:
    def program(comm: Comm) -> int:
        checkpoints, calls = Checkpoints(tmp_path, PLAN, comm, every=1000), 0
        checkpoints(state_of(PLAN, comm.rank, 1000))
        while checkpoints.latest is None and calls < 10_000:
            calls += 1
            checkpoints(state_of(PLAN, comm.rank, 1))
        return calls

    counts = on_ranks(program)
    assert counts[0] == counts[1] < 10_000 and names(tmp_path) == ["step-00001000"]


@pytest.mark.parametrize("copied", [True, False], ids=["", "without the copy"])
def test_what_a_donated_step_writes_over_is_saved_as_it_was(
    copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Gate()
    if not copied:
        monkeypatch.setattr(Buffers, "copies", lambda self, parts: on_cpu(parts))

    def program(comm: Comm) -> bool:
        checkpoints = Checkpoints(tmp_path, PLAN, comm, disk=disk)
        state = state_of(PLAN, comm.rank, 5)
        checkpoints.save(state)
        for x in flatten((state.opt, state.params["w"], state.params["b"], state.step))[0]:
            x.zero_()  # all but what is frozen, which no step writes into
        disk.gate.set()
        checkpoints.wait()
        try:
            return same(checkpoints.restore(), state_of(PLAN, comm.rank, 5))
        except ValueError:  # it changed after its digest was taken
            return False

    assert on_ranks(program) == [copied, copied]


@pytest.mark.parametrize("background", [True, False])
def test_an_error_of_any_writer_reaches_all_ranks_and_loses_nothing(
    background: bool, tmp_path: Path
) -> None:
    disk = Full(rank=1)
    disk.full = False

    def program(comm: Comm) -> tuple[str, Any, Any]:
        checkpoints = Checkpoints(tmp_path, PLAN, comm, background=background, disk=disk)
        checkpoints.save(state_of(PLAN, comm.rank, 1))
        checkpoints.wait()
        comm.all_reduce([torch.ones(1)], MESH.axes)
        disk.full = True
        try:
            checkpoints.save(state_of(PLAN, comm.rank, 2))
            checkpoints.wait()
            message = ""
        except OSError as error:
            message = str(error)
        assert os.listdir(tmp_path) == ["step-00000001"], "something was left"
        kept = checkpoints.restore()
        disk.full = False
        checkpoints.save(state_of(PLAN, comm.rank, 3))
        checkpoints.wait()
        return message, kept, checkpoints.restore()

    for rank, (message, kept, after) in enumerate(on_ranks(program)):
        assert message.startswith("[Errno 28] rank 1: No space left on device: ")
        assert same(kept, state_of(PLAN, rank, 1)) and same(after, state_of(PLAN, rank, 3))


def test_an_error_in_the_loop_is_that_error_and_commits_nothing(tmp_path: Path) -> None:
    def program(comm: Comm) -> str:
        try:
            with Checkpoints(tmp_path, PLAN, comm) as checkpoints:
                checkpoints.save(state_of(PLAN, comm.rank, 1))
                raise KeyError("the loss")
        except KeyError as error:
            return str(error)

    assert on_ranks(program) == ["'the loss'"] * 2
    assert names(tmp_path) == []


def test_the_newest_stay_and_leftovers_go(tmp_path: Path) -> None:
    def program(comm: Comm) -> None:
        with Checkpoints(tmp_path, PLAN, comm, keep=2, every=10) as checkpoints:
            for step in range(1, 45):
                checkpoints(state_of(PLAN, comm.rank, step))

    on_ranks(program)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    (tmp_path / "step-00000040" / "manifest.json").unlink()  # as a crash in a removal leaves it
    (tmp_path / "notes.txt").write_text("mine")
    assert names(tmp_path) == ["step-00000030"]

    def again(comm: Comm) -> None:
        checkpoints = Checkpoints(tmp_path, PLAN, comm, keep=None)
        checkpoints.save(state_of(PLAN, comm.rank, 50))
        checkpoints.wait()

    on_ranks(again)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-00000030", "step-00000050"]


def save_some(disk: Disk, directory: Path, steps: tuple[int, ...]) -> None:
    def program(comm: Comm) -> None:
        checkpoints = Checkpoints(
            directory, PLAN, comm, background=False, files={"note": b"x"}, disk=disk
        )
        for step in steps:
            checkpoints.save(state_of(PLAN, comm.rank, step))

    on_ranks(program)


def test_what_does_not_change_is_written_once(tmp_path: Path) -> None:
    save_some(DISK, tmp_path, (1, 2, 3))
    for path in tmp_path.glob("*/*"):
        changes = path.name.startswith(("rank-", "manifest"))
        assert path.stat().st_nlink == (1 if changes else 3), path
    frozen = {path.name for path in tmp_path.glob("*/frozen-*")}
    assert len(frozen) == 2
    for path in committed(tmp_path):
        assert not verify(path).problems


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_no_links_can_be_made_it_is_written_again(error: int, tmp_path: Path) -> None:
    class NoLinks(Disk):
        def link(self, old: Path, new: Path) -> None:
            raise OSError(error, os.strerror(error), str(new))

    save_some(NoLinks(), tmp_path, (1, 2))
    for path in committed(tmp_path):
        assert not verify(path).problems
        assert all(file.stat().st_nlink == 1 for file in path.iterdir())


def test_each_checkpoint_is_complete_without_the_others() -> None:
    disk = MemoryDisk()
    counting = Faulty(disk)
    save_some(counting, Path("/runs"), (1, 2, 3, 4))
    assert sum(what.startswith("link") for what in counting.done) == 3 * 3
    assert [path.name[-1] for path in committed("/runs", disk)] == ["2", "3", "4"]
    for path in committed("/runs", disk):
        assert not verify(path, disk=disk).problems


@pytest.mark.parametrize("broken", ["payload", "manifest"])
def test_a_damaged_newest_is_refused_and_the_one_in_order_is_named(
    broken: str, tmp_path: Path
) -> None:
    save_some(DISK, tmp_path, (1, 2, 3))
    for step in (2, 3):
        folder = tmp_path / f"step-0000000{step}"
        path = folder / "manifest.json" if broken == "manifest" else next(folder.glob("rank-*"))
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)

    def program(comm: Comm) -> str:
        with pytest.raises(Damaged) as caught:
            Checkpoints(tmp_path, PLAN, comm).restore()
        return str(caught.value)

    first, second = on_ranks(program)
    assert first == second and "step-00000003" in first and "damaged" in first
    assert first.endswith(
        f"{tmp_path / 'step-00000001'} is in order, move step-00000002, step-00000003 away to "
        "go on from it"
    )


def test_what_one_rank_finds_damaged_is_so_for_all(tmp_path: Path) -> None:
    class Longer(Disk):
        """A disk on which the payloads of step 3 have grown."""

        def size(self, path: Path) -> int | None:
            size = super().size(path)
            grows = path.suffix == ".safetensors" and path.parent.name == "step-00000003"
            return size + 1 if grows and size else size

    save_some(DISK, tmp_path, (1, 2, 3))

    def program(comm: Comm) -> str:
        disk = Longer() if comm.rank else DISK
        with pytest.raises(Damaged) as caught:
            Checkpoints(tmp_path, PLAN, comm, disk=disk).restore()
        return str(caught.value)

    first, second = on_ranks(program)
    assert first == second and first.startswith("rank 1: ") and "bytes and should have" in first
    assert first.endswith("step-00000002 is in order, move step-00000003 away to go on from it")


class Reading(Disk):
    """Knows how many bytes of the payloads of a folder have been read, but for their headers."""

    def __init__(self, folder: str) -> None:
        self.folder, self.count = folder, 0

    def read(self, path: Path, start: int, memory: memoryview) -> Iterator[memoryview]:
        for part in super().read(path, start, memory):
            if start and path.parent.name == self.folder and path.suffix == ".safetensors":
                self.count += len(part)
            yield part


def test_ranks_share_the_reading_of_what_may_be_in_order(tmp_path: Path) -> None:
    save_some(DISK, tmp_path, (1, 2))
    spoiled = next((tmp_path / "step-00000002").glob("rank-*"))
    spoiled.write_bytes(spoiled.read_bytes()[:-1])

    def program(comm: Comm | None) -> int:
        disk = Reading("step-00000001")
        if comm is None:
            assert not verify(tmp_path / "step-00000001", disk=disk).problems
        else:
            with pytest.raises(Damaged, match="step-00000001 is in order"):
                Checkpoints(tmp_path, PLAN, comm, disk=disk).restore()
        return disk.count

    whole = program(None)
    shares = on_ranks(program)
    assert sum(shares) == whole and max(shares) < whole


class Unreadable(Disk):
    def read(self, path: Path, start: int, memory: memoryview) -> Iterator[memoryview]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "the medium")


@pytest.mark.parametrize("other", ["a plan", "a medium", "a format"])
def test_what_is_no_damage_makes_nobody_read_the_others(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_some(DISK, tmp_path, (1, 2))
    read: list[Path] = []
    monkeypatch.setattr(module, "is_whole", lambda path, *_: read.append(path))
    disk, plan = Unreadable() if other == "a medium" else DISK, PLAN
    if other == "a plan":
        wider = {**PARAMS, "b": torch.empty(6, dtype=torch.float64)}
        plan = make_plan(wider, LABELS, RULES, MESH, frozen=("still",))
    if other == "a format":
        manifest = tmp_path / "step-00000002" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes().replace(b'"version":1', b'"version":9'))

    def program(comm: Comm) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            Checkpoints(tmp_path, plan, comm, disk=disk).restore()
        assert not isinstance(caught.value, Damaged)
        return str(caught.value)

    first, second = on_ranks(program)
    said = {
        "a plan": r"params\['b'\] \(6,\) expected, but \(5,\) was saved: it is another model's$",
        "a medium": r"\[Errno 5\] Input/output error: 'the medium'$",
        "a format": r"has format version 9, .*: update functional-ep$",
    }
    assert first == second and re.search(said[other], first) and read == []


@pytest.mark.parametrize("saves", [True, False], ids=["save", "call"])
def test_another_future_is_not_mixed_with_this_one(saves: bool, tmp_path: Path) -> None:
    save_some(DISK, tmp_path, (1, 9))

    def program(comm: Comm) -> None:
        checkpoints = Checkpoints(tmp_path, PLAN, comm)
        (checkpoints.save if saves else checkpoints)(state_of(PLAN, comm.rank, 2))

    with pytest.raises(ValueError, match=r"step-00000009 is there, but training is at step 2,"):
        on_ranks(program)
    assert names(tmp_path) == ["step-00000001", "step-00000009"]


def test_a_plan_that_does_not_fit_is_not_called_damage(tmp_path: Path) -> None:
    save_some(DISK, tmp_path, (1, 2))
    plan = make_plan({"w": torch.zeros(1)}, {"w": "x"}, {"x": replicated()}, Mesh())

    def program(comm: Comm) -> None:
        Checkpoints(tmp_path, plan, comm).restore()

    with pytest.raises(ValueError, match=r"lacks, \['b', 'kept', 'none', 's'\]\n"):
        simulate(program, plan.mesh)


def test_memory_for_copies_is_kept(tmp_path: Path) -> None:
    def program(comm: Comm) -> bool:
        checkpoints, places = Checkpoints(tmp_path, PLAN, comm), list[set[int]]()
        for step in (1, 2):
            state = state_of(PLAN, comm.rank, step)
            checkpoints.save(state)
            pending = checkpoints._pending
            assert pending is not None
            parts = [part for part in pending.saving.parts if part.lo < part.hi]
            places.append({part.x.data_ptr() for part in parts if not part.frozen})
            frozen = {part.x.data_ptr() for part in parts if part.frozen}
            assert frozen == {state.params["kept"].data_ptr()}, "nobody writes into it"
        checkpoints.wait()
        return places[0] == places[1] and same(checkpoints.restore(), state_of(PLAN, comm.rank, 2))

    assert on_ranks(program) == [True, True]


def test_nothing_saved_is_nothing_restored(tmp_path: Path) -> None:
    def program(comm: Comm) -> State | None:
        return Checkpoints(tmp_path / "not there yet", PLAN, comm).restore()

    assert on_ranks(program) == [None, None]
    for wrong in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="at least 1 each; keep=None keeps all"):
            Checkpoints(tmp_path, PLAN, None, **wrong)  # pyright: ignore[reportArgumentType]


def on_real_ranks(comm: Comm, directory: Path) -> bool:
    state = state_of(PLAN, comm.rank, 0)
    with Checkpoints(directory, PLAN, comm, every=3, keep=2) as checkpoints:
        for step in range(1, 11):
            state = state_of(PLAN, comm.rank, step)
            checkpoints(state)
    return same(checkpoints.restore(), state_of(PLAN, comm.rank, 9))


def test_real_ranks_write_behind_their_training(ranks2: Farm, tmp_path: Path) -> None:
    assert ranks2.run(on_real_ranks, MESH, [tmp_path] * 2) == [True, True]
    assert names(tmp_path) == ["step-00000006", "step-00000009"]
    assert describe(tmp_path / "step-00000009").step == 9
