"""Sealed: JSON that ends in the digest of all that is before it, so that no flipped bit passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

ALGORITHM = "xxh3_128"
T = TypeVar("T")


class Damaged(ValueError):
    """Bytes that are not those that were written: another copy may be in order."""


class Newer(ValueError):
    """A file of a format that is younger than this code."""


class Kind(NamedTuple):
    """What a file calls its format, the version that this code writes, and a way out of damage.

    Versions before the ``oldest`` say something else by the same words, and are not read.
    """

    format: str
    version: int
    otherwise: str
    oldest: int = 1


def digest(memory: bytes | memoryview) -> str:
    """The 128 bits of xxh3, in hex: a flipped bit changes them; it is no signature.

    >>> digest(b"abc")
    '06b05ab6733a618578af5f94892f3950'
    """
    return xxhash.xxh3_128_hexdigest(memory)


def seal(body: dict[str, Any]) -> bytes:
    """The one text of a body, which ends in the digest of all that is before it.

    >>> seal({"version": 1})
    b'{"version":1,"digest":"f85b66263cd7c518c39eab4942849ec0"}\\n'
    """
    return _text(body | {"digest": digest(_text(body))}) + b"\n"


def _text(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


def unseal(text: bytes, where: Path, kind: Kind, parse: Callable[[dict[str, Any]], T]) -> T:
    """``parse(body)`` of a text, if it is just what :func:`seal` made.

    Raises:
        Newer: a version that this code does not know yet.
        ValueError: a version that it does not know any more.
        Damaged: any other text, of which a bit may have flipped; contents that contradict.

    >>> cake = Kind("cake", 1, "Bake")
    >>> text = seal({"format": "cake", "version": 1, "layers": 3})
    >>> unseal(text, Path("x"), cake, lambda body: body["layers"])
    3
    >>> unseal(text.replace(b"3", b"2"), Path("x"), cake, lambda body: body["layers"])
    Traceback (most recent call last):
      ...
    functional_ep.sealed.Damaged: x is damaged, or no cake: its text and its digest disagree. Bake
    """
    try:
        body = json.loads(text)
        version = body["version"]
        if body["format"] != kind.format:
            raise ValueError(f"it is a {body['format']!r}")
        if type(version) is not int or version < 1:
            raise ValueError(f"its version is {version!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(where, kind, error) from None
    if version > kind.version:
        by = f", written by {body['code']}" if "code" in body else ""
        raise Newer(
            f"{where} has format version {version}{by}; this code reads versions up to "
            f"{kind.version}: update functional-ep"
        )
    if version < kind.oldest:
        raise ValueError(
            f"{where} has format version {version}; this code reads versions from {kind.oldest} "
            f"on: use the functional-ep that wrote it. {kind.otherwise}"
        )
    try:
        del body["digest"]
        if seal(body) != text:
            raise ValueError("its text and its digest disagree")
        return parse(body)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(where, kind, error) from None


def _damaged(where: Path, kind: Kind, error: Exception) -> Damaged:
    found = str(error) if isinstance(error, ValueError) else repr(error)
    return Damaged(f"{where} is damaged, or no {kind.format}: {found}. {kind.otherwise}")
