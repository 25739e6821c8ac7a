"""A run is one frozen dataclass; TOML files and ``--set key=value`` change it, by name and type."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from . import lm

T = TypeVar("T")

SEEDS = 2**63  # as many as TOML's integers hold; torch's generators know all of them


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a run; the mesh and the text are given beside it.

    ``batch`` counts sequences over all ranks, ``seq`` the bytes in each. Every ``eval_every``
    steps, and at the end, the first ``eval_bytes`` bytes of the validation text are predicted.
    ``warmup`` is a share of the steps; ``clip = inf`` never clips; ``sample`` is the number of
    bytes to generate at the end. ``weights`` is a directory in hub layout, whose model is trained
    instead of ``model``; texts are the tokens of its tokenizer then, for ``seq`` and ``sample``.
    ``compile`` fuses what lies between the experts: faster steps, after a slow first one.
    """

    model: lm.Config = field(default_factory=lm.Config)
    steps: int = 750
    batch: int = 8
    seq: int = 128
    lr: float = 8e-4
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 150
    eval_bytes: int = 65536
    sample: int = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    weights: str = ""
    compile: bool = False

    def __post_init__(self) -> None:
        least = dict(steps=1, batch=1, seq=1, seed=0, eval_every=1, eval_bytes=2, sample=0)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {bound}")
        if self.seed >= SEEDS:
            raise ValueError(f"seed = {self.seed}: must be less than 2**63")
        if self.model.vocab != 256:
            raise ValueError(f"model.vocab = {self.model.vocab}: texts are bytes, so it is 256")
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0, and finite")
        if not self.clip > 0:
            raise ValueError(f"clip = {self.clip}: must be positive; inf does not clip")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup = {self.warmup}: a share of the steps, from 0 to less than 1")


def load(config: T, path: str | Path) -> T:
    """``config`` with the values of a TOML file in place of its own.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not TOML, or names an unknown key.
        TypeError: a value has another type than its key.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OSError(
            f"cannot read --config {path}: {error.strerror}; give an existing TOML file"
        ) from error
    except ValueError as error:
        raise ValueError(f"--config {path} is not TOML: {error}") from error
    return merge(config, table, where=f"--config {path}")


def assign(config: T, assignment: str) -> T:
    """``config`` with one dotted key changed; values as in TOML, and a bare word is a string.

    >>> assign(Recipe(), "model.layers=2").model.layers
    2
    >>> assign(Recipe(), "precision=bf16").precision
    'bf16'
    """
    key, equals, text = (part.strip() for part in assignment.partition("="))
    if not key or not equals:
        raise ValueError(
            f"--set {assignment}: not an assignment; write --set key=value, as in --set lr=1e-3"
        )
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for name in reversed(key.split(".")):
        value = {name: value}
    return merge(config, value, where=f"--set {assignment}")


def merge(config: T, table: Mapping[str, Any], *, where: str, prefix: str = "") -> T:
    """``config`` with the values of a nested table in place of its own; all others stay.

    Raises:
        ValueError: an unknown key, with the known ones and the closest; a value out of range.
        TypeError: a value of another type, with key, found and expected.
    """
    annotations = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in annotations:
            raise ValueError(_unknown(key, [prefix + known for known in annotations], where))
        current = getattr(config, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            nested = cast(Mapping[str, Any], value)
            changes[name] = merge(current, nested, where=where, prefix=f"{key}.")
        else:
            changes[name] = _typed(value, annotations[name], key, where)
    try:
        return replace(cast(Any, config), **changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def dumps(config: object) -> str:
    """The TOML text that `load` turns back into ``config``.

    >>> merge(Recipe(), tomllib.loads(dumps(Recipe(steps=7))), where="here") == Recipe(steps=7)
    True
    """
    return "\n".join(_lines(config, "")) + "\n"


def _lines(config: object, table: str) -> Iterator[str]:
    values = {item.name: getattr(config, item.name) for item in fields(cast(Any, config))}
    nested = {name: value for name, value in values.items() if is_dataclass(value)}
    yield from (
        f"{name} = {_literal(value)}" for name, value in values.items() if name not in nested
    )
    for name, value in nested.items():
        yield f"\n[{table}{name}]"
        yield from _lines(value, f"{table}{name}.")


def _literal(value: object) -> str:
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _typed(value: object, annotation: Any, key: str, where: str) -> object:
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if value in choices:
            return value
        raise ValueError(
            f"{key} = {value!r} ({where}): expected one of {', '.join(map(repr, choices))}"
        )
    if annotation is float and type(value) is int:
        return float(value)
    if type(value) is not annotation:
        found = type(value).__name__
        raise TypeError(
            f"{key} = {value!r} ({where}): found {found}, expected {_wanted(annotation)}"
        )
    return value


def _wanted(annotation: Any) -> str:
    if is_dataclass(annotation):
        return "a table of " + ", ".join(item.name for item in fields(annotation))
    return "bool (true or false)" if annotation is bool else annotation.__name__


def _unknown(key: str, known: list[str], where: str) -> str:
    closest = get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {closest[0]!r}? " if closest else ""
    return f"unknown key {key!r} ({where}); {hint}known keys: {', '.join(known)}"
