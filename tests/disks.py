"""Disks that are not real: one that forgets what was never synced, one that fails when it is told.

What a crash may leave of a disk: every entry of a directory that was synced since; of the others
any selection, also the new name of a file without its old one's end; of a file that was written
after it was synced, any beginning. That is more than any real file system loses.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from functional_ep.checkpoint.disk import Disk

R = TypeVar("R")


class Inode:
    """A file's bytes, those that are safe, and whether it is open."""

    def __init__(self, data: bytes = b"") -> None:
        self.data, self.synced = bytearray(data), bytes(data)


DIRECTORY, NOWHERE = Inode(), Path()
Node = Inode | None  # None: no such entry


class MemoryDisk(Disk):
    """Files in memory, of which it is known what would survive."""

    def __init__(self, nodes: dict[Path, Inode] | None = None) -> None:
        self.nodes: dict[Path, Inode] = dict(nodes or {Path("/"): DIRECTORY})
        self.safe = dict(self.nodes)
        self.journal: dict[Path, list[dict[Path, Node]]] = {}
        self.open: list[Inode] = []
        self.locks: list[Path] = []

    def _change(self, path: Path, changes: dict[Path, Node]) -> None:
        self._directory(path.parent)
        self.journal.setdefault(path.parent, []).append(changes)
        _apply(self.nodes, changes)

    def _directory(self, path: Path) -> None:
        if self.nodes.get(path) is not DIRECTORY:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    def _file(self, path: Path) -> Inode:
        node = self.nodes.get(path)
        if node is None or node is DIRECTORY:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return node

    def names(self, path: Path) -> list[str] | None:
        if self.nodes.get(path) is not DIRECTORY:
            return None
        return sorted(other.name for other in self.nodes if other.parent == path != other)

    def size(self, path: Path) -> int | None:
        node = self.nodes.get(path)
        return None if node is None or node is DIRECTORY else len(node.data)

    def read(self, path: Path, start: int, memory: memoryview) -> Iterator[memoryview]:
        found = self._file(path).data[start : start + len(memory)]
        memory[: len(found)] = found
        yield memory[: len(found)]

    def make_directory(self, path: Path) -> None:
        if path in self.nodes:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self._change(path, {path: DIRECTORY})

    def create(self, path: Path) -> int:
        node = self.nodes.get(path)
        if node is None:
            node = Inode()
            self._change(path, {path: node})
        node.data.clear()
        self.open.append(node)
        return len(self.open) - 1

    def write(self, file: int, memory: memoryview) -> None:
        self.open[file].data.extend(memory)

    def sync(self, file: int) -> None:
        self.open[file].synced = bytes(self.open[file].data)

    def close(self, file: int) -> None: ...

    def sync_directory(self, path: Path) -> None:
        self._directory(path)
        for changes in self.journal.pop(path, []):
            _apply(self.safe, changes)

    def rename(self, old: Path, new: Path) -> None:
        node = self._file(old)
        if self.nodes.get(new) is not node:  # two names of one file: nothing happens
            self._change(new, {old: None, new: node})

    def link(self, old: Path, new: Path) -> None:
        node = self._file(old)
        if new in self.nodes:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        self._change(new, {new: node})

    def remove(self, path: Path) -> None:
        self._file(path)
        self._change(path, {path: None})

    def remove_directory(self, path: Path) -> None:
        assert self.names(path) == []
        self._change(path, {path: None})

    def lock(self, path: Path) -> int:
        if path in self.locks or self.nodes.get(path) is not DIRECTORY:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
        self.locks.append(path)
        return len(self.locks) - 1

    def unlock(self, lock: int) -> None:
        self.locks[lock] = NOWHERE

    def after_crash(self, chance: random.Random | None) -> MemoryDisk:
        """A disk that may be found after a crash; without chance all is lost that may be."""
        nodes = dict(self.safe)
        for changes in self.journal.values():
            for change in changes:
                if chance and chance.random() < 0.5:
                    _apply(nodes, change)
        kept = {path for path in nodes if all(nodes.get(p) is DIRECTORY for p in path.parents)}
        survivors: dict[int, Inode] = {id(DIRECTORY): DIRECTORY}
        for node in (nodes[path] for path in kept):
            survivors.setdefault(id(node), Inode(_left(node, chance)))
        return MemoryDisk({path: survivors[id(nodes[path])] for path in kept})


def _left(node: Inode, chance: random.Random | None) -> bytes:
    if bytes(node.data) == node.synced:
        return node.synced
    return bytes(node.data[: chance.randint(0, len(node.data)) if chance else 0])


def _apply(nodes: dict[Path, Inode], changes: dict[Path, Node]) -> None:
    for path, node in changes.items():
        if node is None:
            nodes.pop(path, None)
        else:
            nodes[path] = node


class Crash(BaseException):
    """The machine stops: nothing that the program does after it counts."""


class Faulty(Disk):
    """Another disk, of which one operation that changes it fails: the ``at``-th, from 0 on.

    Args:
        inner: the other disk.
        at: which one; None fails never, and counts.
        error: a number raises that system error, without effect, and a write writes a part; None
            crashes, before or ``after`` the operation.
        only: the kinds of operations that fail, from that one on; all others succeed.
    """

    def __init__(
        self, inner: Disk, at: int | None = None, error: int | None = None, after: bool = False
    ) -> None:
        self.inner, self.at, self.error, self.after = inner, at, error, after
        self.done: list[str] = []
        self.locks: set[int] = set()
        self.crashed = False

    def _act(self, what: str, action: Callable[[], R]) -> R:
        if self.crashed:
            raise Crash
        number, path = len(self.done), what.split(" ")[-1]
        self.done.append(what)
        if number != self.at:
            return action()
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error), path)
        if self.after:
            action()
        self.crashed = True
        for lock in self.locks:  # the kernel does it
            self.inner.unlock(lock)
        raise Crash

    def names(self, path: Path) -> list[str] | None:
        return self.inner.names(path)

    def size(self, path: Path) -> int | None:
        return self.inner.size(path)

    def read(self, path: Path, start: int, memory: memoryview) -> Iterator[memoryview]:
        return self.inner.read(path, start, memory)

    def make_directory(self, path: Path) -> None:
        self._act(f"make_directory {path}", lambda: self.inner.make_directory(path))

    def create(self, path: Path) -> int:
        return self._act(f"create {path}", lambda: self.inner.create(path))

    def write(self, file: int, memory: memoryview) -> None:
        half = len(memory) // 2
        self._act(f"write {file}", lambda: self.inner.write(file, memory[:half]))
        self._act(f"write {file}", lambda: self.inner.write(file, memory[half:]))

    def sync(self, file: int) -> None:
        self._act(f"sync {file}", lambda: self.inner.sync(file))

    def close(self, file: int) -> None:
        if self.crashed:
            raise Crash
        self.inner.close(file)

    def sync_directory(self, path: Path) -> None:
        self._act(f"sync_directory {path}", lambda: self.inner.sync_directory(path))

    def rename(self, old: Path, new: Path) -> None:
        self._act(f"rename {new}", lambda: self.inner.rename(old, new))

    def link(self, old: Path, new: Path) -> None:
        self._act(f"link {new}", lambda: self.inner.link(old, new))

    def remove(self, path: Path) -> None:
        self._act(f"remove {path}", lambda: self.inner.remove(path))

    def remove_directory(self, path: Path) -> None:
        self._act(f"remove_directory {path}", lambda: self.inner.remove_directory(path))

    def lock(self, path: Path) -> int:
        return self._act(f"lock {path}", lambda: self._locked(path))

    def _locked(self, path: Path) -> int:
        lock = self.inner.lock(path)
        self.locks.add(lock)
        return lock

    def unlock(self, lock: int) -> None:
        """The machine may stop at it, but it never fails."""
        if self.crashed:
            return
        if self.error is not None and len(self.done) == self.at:
            self.at = None
        self._act(f"unlock {lock}", lambda: self._unlocked(lock))

    def _unlocked(self, lock: int) -> None:
        self.locks.remove(lock)
        self.inner.unlock(lock)
