"""Disk: the few operations on files that a checkpoint is made of, each of which may fail alone."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SLICE = 2**18  # bytes that are read at a time: they stay in a core's cache
LOCKLESS = {errno.ENOTSUP, errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


class Disk:
    """The operations of this machine's file systems, one system call each.

    Everything that saves or restores is handed one, so that a test can put another in its place:
    one that crashes, is full, or forgets what was never synced.
    """

    def names(self, path: Path) -> list[str] | None:
        """What a directory holds, in order of names; None where there is no directory."""
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, path: Path) -> int | None:
        """The bytes of a file; None where there is none, which a directory is not."""
        try:
            found = os.stat(path)
            return None if stat.S_ISDIR(found.st_mode) else found.st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, path: Path, start: int, memory: memoryview) -> Iterator[memoryview]:
        """Fill memory with the bytes from ``start``: slice by slice, each while it is in cache.

        Where the file ends, so do the slices.
        """
        file, found = os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
        try:
            while found < len(memory):
                slice = memory[found : found + SLICE]
                count = os.preadv(file, [slice], start + found)
                if not count:
                    break
                yield slice[:count]
                found += count
        finally:
            os.close(file)

    def make_directory(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """An empty file, open for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, file: int, memory: memoryview) -> None:
        """Append to an open file."""
        while memory:
            memory = memory[os.write(file, memory) :]

    def sync(self, file: int) -> None:
        """The numbers of an open file reach the medium."""
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def sync_directory(self, path: Path) -> None:
        """What was created, renamed or removed in a directory reaches the medium."""
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def rename(self, old: Path, new: Path) -> None:
        """At once, over what may be there."""
        os.rename(old, new)

    def link(self, old: Path, new: Path) -> None:
        """A second name for the same bytes."""
        os.link(old, new)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        os.rmdir(path)

    def lock(self, path: Path) -> int:
        """Keep a directory from all who would lock it too, until ``unlock``, or this process ends.

        Not all file systems have locks: where there are none, none is taken.

        Raises:
            BlockingIOError: another has it.
        """
        import fcntl  # which not all systems have that can import this

        try:
            file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:  # whoever had the lock has removed it just now
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path)) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
        except OSError as error:
            if error.errno not in LOCKLESS:
                os.close(file)
                raise
        return file

    def unlock(self, lock: int) -> None:
        """A forked process may still have the descriptor, so closing it does not do."""
        import fcntl

        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open directory still has this name, or lost it while nobody had the lock."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


DISK = Disk()


def read_all(path: Path, disk: Disk) -> bytes | None:
    """The whole of a small file; None where there is nothing."""
    size = disk.size(path)
    if size is None:
        return None
    memory = bytearray(size)
    return bytes(memory[: sum(map(len, disk.read(path, 0, memoryview(memory))))])


def write_all(path: Path, memories: list[memoryview], disk: Disk) -> None:
    """A file of these bytes, one after the other, all of which have reached the medium."""
    file = disk.create(path)
    try:
        for memory in memories:
            disk.write(file, memory)
        disk.sync(file)
    except OSError as error:  # that of an open file does not say of which
        error.filename = error.filename or str(path)
        raise
    finally:
        disk.close(file)


def make_directories(path: Path, disk: Disk) -> None:
    """The directory, and those above it, so that they survive a crash."""
    if disk.names(path) is None:
        make_directories(path.parent, disk)
        try:
            disk.make_directory(path)
        except FileExistsError:  # by another process, meanwhile
            if disk.names(path) is None:
                raise
        disk.sync_directory(path.parent)
