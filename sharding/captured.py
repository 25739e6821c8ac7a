"""What a function takes from elsewhere than its arguments, where it can be seen."""

from __future__ import annotations

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
        yield from f.named_parameters()
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
    for name in _global_names(f.__code__):
        if isinstance(f.__globals__.get(name), Captured):
            yield name, f.__globals__[name]
    positional = f.__code__.co_varnames[: f.__code__.co_argcount]
    yield from zip(reversed(positional), reversed(f.__defaults__ or ()), strict=False)
    yield from (f.__kwdefaults__ or {}).items()


def _global_names(code: CodeType) -> Iterator[str]:
    """Of globals and attributes, also in functions that are defined inside."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _global_names(inner)
