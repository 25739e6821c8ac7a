"""A crash at any operation of a save, and a disk that is full or read-only, lose nothing.

Every operation that a save does to the disk is enumerated, on all ranks in lock step; the machine
stops before it or after it, and of what was not synced anything may be lost.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import NOWHERE, Crash, Faulty, MemoryDisk
from states import a_plan, alone, same, state_of

from functional_ep import Checkpoints, restore, save
from functional_ep.checkpoint import committed, folder
from functional_ep.checkpoint.disk import DISK, Disk
from functional_ep.checkpoint.folder import read_manifest
from sharding import Comm, Mesh, simulate, zero3
from sharding.rule import Rule

RULES: dict[str, Rule] = dict.fromkeys(("expert", "dense", "still"), zero3("ep"))
PLAN, ALONE = a_plan(Mesh(ep=2), RULES), alone()
OLD, NEW, NEXT = 1, 2, 3
ROOT = Path("/saved")
CHANCES = 2  # disks that a crash may leave, beside the one that has lost the most


def write(disk: Disk, seed: int, root: Path = ROOT) -> None:
    def program(comm: Comm) -> None:
        save(root / "one", state_of(PLAN, comm.rank, seed), PLAN, comm, disk=disk)

    simulate(program, PLAN.mesh)


def keep_two(disk: Disk, seed: int, root: Path = ROOT) -> None:
    """A directory of checkpoints, with links of what is frozen; the oldest goes."""

    def program(comm: Comm) -> None:
        state = state_of(PLAN, comm.rank, seed)
        Checkpoints(root, PLAN, comm, keep=2, background=False, disk=disk).save(state)

    simulate(program, PLAN.mesh)


def found(path: Path, disk: Disk) -> int | None:
    """Which state can be restored, or None if there is no checkpoint; else it is an error."""

    def program(comm: Comm) -> Any:
        return restore(path, ALONE, comm, disk=disk)

    if disk.size(path / "manifest.json") is None:
        return None
    (state,) = simulate(program, ALONE.mesh)
    assert same(state, state_of(ALONE, 0, int(state.step))), "the state is mixed"
    return int(state.step)


def is_tidy(path: Path, disk: Disk) -> None:
    names = read_manifest(path, disk).names | {"manifest.json"}
    assert set(disk.names(path) or ()) == names, "something was left"


Save = Callable[[Disk, int], None]


def start(act: Save, before: int) -> MemoryDisk:
    """A disk on which this many saves have been made, the last one of OLD."""
    disk = MemoryDisk()
    disk.make_directory(ROOT)
    disk.sync_directory(Path("/"))
    for back in reversed(range(before)):
        act(disk, OLD - back)
    return disk


def count(act: Save, before: int) -> list[str]:
    counting = Faulty(start(act, before))
    act(counting, NEW)
    return counting.done


def survives(act: Save, before: int, at: int, after: bool, old: Any, new: Any) -> None:
    """Old or new is on whatever disk a crash leaves, and the next save works and tidies up."""
    chance = random.Random(at)
    disk = start(act, before)
    with pytest.raises(Crash):
        act(Faulty(disk, at, after=after), NEW)
    for draw in [None, *[chance] * CHANCES]:
        left = disk.after_crash(draw)
        assert state_on(left) in (old, new), f"neither old nor new after operation {at}"
        act(left, NEXT)
        assert state_on(left)[-1] == NEXT
        for path in [ROOT / "one"] if act is write else committed(ROOT, left):
            is_tidy(path, left)
        if act is keep_two:
            assert left.names(ROOT) == [path.name for path in committed(ROOT, left)]
            assert len(committed(ROOT, left)) == min(2, len(state_on(left)))


def state_on(disk: Disk) -> list[int | None]:
    if disk.names(ROOT / "one") is not None or not committed(ROOT, disk):
        return [found(ROOT / "one", disk)]
    return [found(path, disk) for path in committed(ROOT, disk)]


FRESH, AGAIN = (write, 0, [[None], [NEW]]), (write, 1, [[OLD], [NEW]])


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("act", "before", "states"), [FRESH, AGAIN], ids=["fresh", "again"])
def test_a_crash_anywhere_in_a_save_leaves_old_or_new(
    act: Save, before: int, states: list[Any], after: bool
) -> None:
    operations = count(act, before)
    assert len(operations) > 20 + 4 * before
    for at in range(len(operations)):
        survives(act, before, at, after, *states)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_anywhere_in_a_save_with_links_and_removals_leaves_what_was_there(
    after: bool,
) -> None:
    """Between old and new the directory has three; older ones stay whole until they are gone."""
    operations = count(keep_two, 2)
    assert any(what.startswith("link") for what in operations)
    assert any(what.startswith("remove_directory") for what in operations)
    allowed = [[0, 1], [0, 1, 2], [1, 2]]
    for at in range(len(operations)):
        disk = start(keep_two, 2)
        with pytest.raises(Crash):
            keep_two(Faulty(disk, at, after=after), NEW)
        for draw in [None, *[random.Random(at)] * CHANCES]:
            left = disk.after_crash(draw)
            states = [found(path, left) for path in committed(ROOT, left)]
            assert states in allowed, f"{states} after operation {at}, {operations[at]}"
            keep_two(left, NEXT)
            assert [found(path, left) for path in committed(ROOT, left)][-1] == NEXT
            assert left.names(ROOT) == [path.name for path in committed(ROOT, left)]
            assert len(committed(ROOT, left)) == 2
            for path in committed(ROOT, left):
                is_tidy(path, left)


def test_on_a_real_disk_as_well(tmp_path: Path) -> None:
    """Nothing is lost there that was written: the program is killed, not the machine."""
    counting = Faulty(DISK)
    write(counting, NEW, tmp_path / "count")
    for at in range(0, len(counting.done), 3):
        for before in (0, 1):
            root = tmp_path / f"{at}-{before}"
            if before:
                write(DISK, OLD, root)
            faulty = Faulty(DISK, at, after=bool(at % 2))
            try:
                write(faulty, NEW, root)
            except Crash:
                assert found(root / "one", DISK) in ((OLD, NEW) if before else (None, NEW))
            write(DISK, NEXT, root)
            assert found(root / "one", DISK) == NEXT
            is_tidy(root / "one", DISK)


# -- planted mistakes ------------------------------------------------------------------------------


def in_place(path: Path, manifest: Any, disk: Disk) -> None:
    from functional_ep.checkpoint.disk import write_all
    from functional_ep.checkpoint.manifest import to_bytes

    write_all(path / "manifest.json", [memoryview(to_bytes(manifest))], disk)
    folder.sweep(path, disk)


def unsynced(path: Path, memories: list[memoryview], disk: Disk) -> None:
    file = disk.create(path)
    for memory in memories:
        disk.write(file, memory)
    disk.close(file)


def hasty(path: Path, manifest: Any, disk: Disk) -> None:
    """Removes what is old before the new manifest's name is safe."""
    from functional_ep.checkpoint.disk import write_all
    from functional_ep.checkpoint.manifest import to_bytes

    growing = folder.growing(path / "manifest.json")
    write_all(growing, [memoryview(to_bytes(manifest))], disk)
    for name in disk.names(path) or ():
        if name.endswith("safetensors") and name not in manifest.names:
            disk.remove(path / name)
    disk.rename(growing, path / "manifest.json")
    folder.sweep(path, disk)


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        ("saving", "put_manifest", in_place),
        ("saving", "put_manifest", hasty),
        ("payload", "write_all", unsynced),
        ("folder", "write_all", unsynced),
    ],
    ids=["manifest in place", "old removed first", "payload not synced", "manifest not synced"],
)
def test_a_save_that_can_lose_something_is_found(
    where: str, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"functional_ep.checkpoint.{where}.{name}", wrong)
    operations = count(write, 1)
    with pytest.raises((AssertionError, ValueError, OSError)):
        for at in reversed(range(len(operations))):
            survives(write, 1, at, True, [OLD], [NEW])


# -- errors without a crash ------------------------------------------------------------------------


def errors_of(disk: Disk, act: Callable[[Comm], None]) -> list[str]:
    """What each rank raised, or nothing."""

    def program(comm: Comm) -> str:
        try:
            act(comm)
        except OSError as error:
            return str(error)
        return ""

    return simulate(program, PLAN.mesh)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("before", [0, 1], ids=["fresh", "again"])
def test_a_disk_that_fails_is_an_error_on_all_ranks_and_loses_nothing(
    error: int, before: int
) -> None:
    operations, old = count(write, before), OLD if before else None
    moment = operations.index(f"rename {ROOT}/one/manifest.json")
    untouched = start(write, before).names(ROOT / "one")
    for at in range(len(operations)):
        disk = start(write, before)
        faulty = Faulty(disk, at, error)

        def act(comm: Comm, faulty: Disk = faulty) -> None:
            save(ROOT / "one", state_of(PLAN, comm.rank, NEW), PLAN, comm, disk=faulty)

        first, second = errors_of(disk, act)
        saved = operations[at].startswith(("unlock", "remove")) and at > moment
        expected = "" if saved else f"[Errno {error}] rank"
        assert first == second and first.startswith(expected) and bool(first) != saved, operations[
            at
        ]
        assert "may not survive" in first or at != moment + 1
        assert found(ROOT / "one", disk) in ((NEW,) if saved else (old, NEW))
        assert set(disk.locks) <= {NOWHERE}, f"{operations[at]}: a lock was left"
        if at <= moment:
            assert found(ROOT / "one", disk) == old, operations[at]
            assert disk.names(ROOT / "one") == untouched, f"{operations[at]}: something was left"
        write(disk, NEXT)
        assert found(ROOT / "one", disk) == NEXT
        is_tidy(ROOT / "one", disk)
