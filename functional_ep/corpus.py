"""Corpora: the bytes of texts, split by file into training and validation."""

import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .safetensors_file import memory_of

T = TypeVar("T")

VALIDATION_SHARE = 0.05
KINDS = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


class Corpus(NamedTuple):
    """Two uint8 vectors with no byte in common, and a sentence that says where they come from."""

    train: Tensor
    valid: Tensor
    origin: str


def fingerprint(corpus: Corpus) -> str:
    """A line for each side, equal just if its bytes are.

    >>> print(fingerprint(Corpus(torch.tensor([1]), torch.tensor([2, 3]), "")))
    train: 1 bytes, 00e83d0a3f7519ad
    valid: 2 bytes, 372a12de8bab3e8d
    """
    sides = {"train": corpus.train, "valid": corpus.valid}
    return "\n".join(f"{name}: {len(x)} bytes, {_digest(x)}" for name, x in sides.items())


def bytes_of(text: Tensor) -> memoryview:
    """The bytes of a text; those of a uint8 vector on CPU are not copied.

    >>> bytes(bytes_of(torch.tensor([104, 105])))
    b'hi'
    """
    return memory_of(text.to("cpu", torch.uint8).contiguous())


def _digest(text: Tensor) -> str:
    return blake2b(bytes_of(text), digest_size=8).hexdigest()


def standard_library() -> Corpus:
    """The Python sources of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if foreign.isdisjoint(path.relative_to(root).parts)
    }
    return _split(sorted(files.items()), f"Python's standard library, {root}")


def read(paths: Sequence[str | Path]) -> Corpus:
    """The bytes of files and, recursively, of directories, without their hidden entries.

    Symbolic links are followed, and a directory that several paths lead to is read once.
    Split by file: the digest of a file's path relative to the given directory decides whether it
    trains or validates (about 5 %), so neither other files nor the place of the directory move it.
    Each side keeps one file even where chance says otherwise. A single file is split by bytes: its
    last 5 % validate. A file that two paths lead to counts once.

    Raises:
        OSError: a path that does not exist or cannot be read.
        ValueError: no bytes at all, or none on one side.
    """
    named = [item for path in paths for item in sorted(_files(Path(path)))]
    once = {path.resolve(): (name, path) for name, path in reversed(named)}
    return _split(list(once.values()), ", ".join(map(_shown, paths)))


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield path.name, path
    elif path.is_dir():
        yield from _inside(path)
    elif path.exists():
        kind = KINDS.get(stat.S_IFMT(path.stat().st_mode), "something else")
        raise ValueError(
            f"--data {path} is {kind}, neither a file nor a directory; "
            "write what it gives to a file"
        )
    else:
        raise FileNotFoundError(
            f"--data {path}: no such file or directory (looked from {Path.cwd()}); "
            f"give an existing path"
        )


def _inside(root: Path) -> Iterator[tuple[str, Path]]:
    """Files below a directory, and their names there: those that no link leads to come first."""
    known: set[Path] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = (folders or links).pop()
        real = folder.resolve()
        if real in known:  # a link back, or a second one
            continue
        known.add(real)
        for entry in _read(folder, lambda path: sorted(path.iterdir())):
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                yield entry.relative_to(root).as_posix(), entry
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry)


def _split(files: Sequence[tuple[str, Path]], origin: str) -> Corpus:
    texts = [(name, _read(path, Path.read_bytes)) for name, path in files]
    texts = sorted(((name, text) for name, text in texts if text), key=lambda item: _place(item[0]))
    if not texts:
        raise ValueError(
            f"no bytes to train on: {origin} holds {len(files)} files, none with any content; "
            f"give --data a file or a directory that has text"
        )
    if len(texts) == 1:
        return _split_bytes(texts[0][1], origin)
    validating = sum(_place(name) < VALIDATION_SHARE for name, _ in texts)
    validating = min(max(validating, 1), len(texts) - 1)
    train, valid = (
        _tensor(b"".join(text for _, text in side))
        for side in (texts[validating:], texts[:validating])
    )
    return Corpus(
        train,
        valid,
        f"{origin}: {len(texts)} files, {validating} of them for validation "
        f"({len(train):,} + {len(valid):,} bytes)",
    )


def _split_bytes(text: bytes, origin: str) -> Corpus:
    cut = len(text) - max(int(len(text) * VALIDATION_SHARE), 1)
    if cut < 1:
        raise ValueError(f"{origin} has one byte in all, nothing to split; give more --data")
    return Corpus(
        _tensor(text[:cut]),
        _tensor(text[cut:]),
        f"{origin}: a single file, so its last {len(text) - cut:,} of {len(text):,} bytes validate",
    )


def _shown(path: str | Path) -> str:
    """A path as text; bytes of it that are none are shown by their numbers."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _place(name: str) -> float:
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest(), "big") / 2**64


def _read(path: Path, how: Callable[[Path], T]) -> T:
    try:
        return how(path)
    except OSError as error:
        raise OSError(
            f"cannot read {path}: {error.strerror}; make it readable, or leave it out of --data"
        ) from error


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
