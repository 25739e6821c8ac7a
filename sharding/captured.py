"""What a function takes from elsewhere than its arguments, where it can be seen."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

Captured = Tensor | torch.Generator
Named = Iterator[tuple[str, Captured]]


class Vouched:
    """A function of which its maker says that it captures nothing; nobody looks into it.

    >>> w = torch.ones(2)
    >>> list(captured(Vouched(lambda x: x * w)))
    []
    """

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f

    def __call__(self, *args: Any) -> Any:
        return self.f(*args)


def captured(f: Any) -> Named:
    """Each tensor and generator that a function captures, once, with its name there.

    Looked into are closures, defaults, methods, partials, callable objects, modules, lists, tuples
    and dicts, and of globals those that are tensors or generators themselves. What an object of
    another kind has as an attribute is not found.

    >>> w = torch.ones(2)
    >>> [name for name, _ in captured(lambda x: x * w)]
    ['w']
    """
    return _captured(f, {})


def _captured(f: Any, seen: dict[int, Any]) -> Named:
    if id(f) in seen or isinstance(f, Vouched):
        return
    seen[id(f)] = f  # held on to: of two objects that live at once, no two have one id
    if isinstance(f, Captured):
        yield "?", f
    elif isinstance(f, partial):
        yield from _captured([f.func, f.args, f.keywords], seen)
    elif isinstance(f, torch.nn.Module):
        yield from _by_name(vars(f).items(), seen)
    elif isinstance(f, MethodType):
        yield from _captured([f.__func__, getattr(f.__self__, "__dict__", {})], seen)
    elif isinstance(f, list | tuple):
        for x in f:
            yield from _captured(x, seen)
    elif isinstance(f, dict):
        yield from _by_name(f.items(), seen)
    elif isinstance(f, FunctionType):
        yield from _by_name(_free_variables(f), seen)
    elif callable(f) and not isinstance(f, type):
        yield from _captured(getattr(f, "__dict__", {}), seen)


def _by_name(xs: Iterable[tuple[Any, Any]], seen: dict[int, Any]) -> Named:
    for name, x in xs:
        for inner, found in _captured(x, seen):
            yield (str(name) if inner == "?" else inner), found


def _free_variables(f: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for code in _codes(f.__code__):
        for name in code.co_names:
            if isinstance(f.__globals__.get(name), Captured) and name in _globals_of(code):
                yield name, f.__globals__[name]
    positional = f.__code__.co_varnames[: f.__code__.co_argcount]
    yield from zip(reversed(positional), reversed(f.__defaults__ or ()), strict=False)
    yield from (f.__kwdefaults__ or {}).items()


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's, and those of functions that are defined inside."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _globals_of(code: CodeType) -> set[str]:
    """The names that are read as globals; others of ``co_names`` are attributes."""
    read = dis.get_instructions(code)
    return {each.argval for each in read if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
