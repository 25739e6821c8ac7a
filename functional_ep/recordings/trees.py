"""Trees as JSON: nothing is pickled, and what is read back runs no code of its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sharding.tree import show

Json = dict[str, Any]
SCALARS = (str, int, float, bool, type(None))


def describe(tree: Any, name: str, tensors: dict[str, Tensor]) -> Json:
    """A tree of dicts, lists, tuples, NamedTuples, tensors and plain values as JSON.

    Its tensors are put into ``tensors``, named after their paths below ``name``.

    Raises:
        ValueError: a node that is none of these, with its path.

    >>> import torch
    >>> tensors = {}
    >>> describe({"x": torch.ones(1), "n": 3}, "batch", tensors)
    {'dict': [['x', {'tensor': 'batch/x'}], ['n', {'value': 3}]]}
    >>> tensors
    {'batch/x': tensor([1.])}
    """
    if isinstance(tree, Tensor):
        unique = name if name not in tensors else f"{name} {len(tensors)}"
        tensors[unique] = tree
        return {"tensor": unique}
    if type(tree) is dict:
        items: dict[Any, Any] = tree
        if not all(type(key) in (str, int) for key in items):
            raise ValueError(f"{name}: keys {list(items)} cannot be recorded: strings can")
        return {"dict": [[k, describe(x, f"{name}/{k}", tensors)] for k, x in items.items()]}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        kind: Any = type(tree)
        return {
            "named": f"{kind.__module__}:{kind.__qualname__}",
            "items": [
                describe(x, f"{name}/{field}", tensors)
                for field, x in zip(kind._fields, tree, strict=True)
            ],
        }
    if type(tree) in (list, tuple):
        values: list[Any] = list(tree)
        nodes = [describe(x, f"{name}/{i}", tensors) for i, x in enumerate(values)]
        return {type(tree).__name__: nodes}
    if type(tree) is float and not math.isfinite(tree):  # JSON has no word for it
        return {"float": str(tree)}
    if type(tree) in SCALARS:
        return {"value": tree}
    raise ValueError(
        f"{name}: a {type(tree).__name__} cannot be recorded: tensors, numbers and strings can, in "
        "dicts, lists, tuples and NamedTuples"
    )


def shown(name: str) -> str:
    """The name of a tensor as a reader would type it.

    >>> shown("batches/0/x")
    "batches[0]['x']"
    """
    root, _, path = name.partition("/")
    return show(path, root)


def rebuild(node: Json, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that :func:`describe` has described.

    Raises:
        ValueError: a NamedTuple that no module that is loaded here defines.
    """
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "dict" in node:
        return {key: rebuild(x, tensors) for key, x in node["dict"]}
    if "named" in node:
        return _named(node["named"])(*(rebuild(x, tensors) for x in node["items"]))
    if "value" in node:
        return node["value"]
    if "float" in node:
        return float(node["float"])
    (kind,) = node
    values = [rebuild(x, tensors) for x in node[kind]]
    return tuple(values) if kind == "tuple" else values


def _named(name: str) -> Any:
    """A NamedTuple of a module that has been imported already: reading imports nothing."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise ValueError(f"the recording has a NamedTuple {name}: import {module} first")
    return found
