"""Until a save has its directory, another process may change it between any two operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import DIRECTORY, Inode, MemoryDisk
from states import a_plan, state_of

from functional_ep import save
from functional_ep.checkpoint import verify
from functional_ep.checkpoint.disk import DISK
from sharding import Comm, Mesh, simulate, zero3

PLAN = a_plan(Mesh(ep=2), dict.fromkeys(("expert", "dense", "still"), zero3("ep")))
PATH = Path("/runs/one")
Nodes = dict[Path, Inode]


def save_one(step: int, disk: MemoryDisk) -> None:
    def program(comm: Comm) -> None:
        save(PATH, state_of(PLAN, comm.rank, step), PLAN, comm, disk=disk)

    simulate(program, PLAN.mesh)


def saved(step: int) -> Nodes:
    disk = MemoryDisk()
    save_one(step, disk)
    return disk.nodes


class Meeting(MemoryDisk):
    """A disk where before the ``at``-th operation, if no one is kept out yet, another acts."""

    def __init__(self, nodes: Nodes, other: Nodes, at: int) -> None:
        super().__init__(nodes)
        self.other, self.left, self.met = other, at, False

    def _meet(self) -> None:
        if self.left == 0 and not self.locks:
            self.nodes, self.met = dict(self.other), True
        self.left -= 1

    def names(self, path: Path) -> list[str] | None:
        self._meet()
        return super().names(path)

    def size(self, path: Path) -> int | None:
        self._meet()
        return super().size(path)

    def read(self, path: Path, start: int, memory: memoryview) -> Iterator[memoryview]:
        self._meet()
        return super().read(path, start, memory)

    def make_directory(self, path: Path) -> None:
        self._meet()
        super().make_directory(path)

    def sync_directory(self, path: Path) -> None:
        self._meet()
        super().sync_directory(path)

    def lock(self, path: Path) -> int:
        self._meet()
        return super().lock(path)


NOTHING: Nodes = {Path("/"): DIRECTORY, PATH.parent: DIRECTORY}
STATES: dict[str, Callable[[], Nodes]] = {
    "nothing": lambda: NOTHING,
    "empty": lambda: {**NOTHING, PATH: DIRECTORY},
    "begun": lambda: {**NOTHING, PATH: DIRECTORY, PATH / ".rank-00000.incomplete": Inode(b"1")},
    "saved": lambda: saved(1),
    "again": lambda: saved(2),
}


@pytest.mark.parametrize("after", STATES)
@pytest.mark.parametrize("before", STATES)
def test_whatever_another_does_before_the_lock_a_save_is_whole_or_refused(
    before: str, after: str
) -> None:
    for at in itertools.count():
        disk = Meeting(STATES[before](), STATES[after](), at)
        try:
            save_one(3, disk)
        except BlockingIOError as error:
            assert "another process is saving to" in str(error)
            assert disk.met and PATH not in disk.nodes
        else:
            found = verify(PATH, disk=disk)
            assert not found.problems
        if not disk.met:
            break
    assert at > 4, "the two did not meet"


def test_a_directory_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    assert DISK.size(tmp_path / "file") == 3
    assert DISK.size(tmp_path) is None and DISK.size(tmp_path / "none") is None
