"""Pytrees: flattening, and names for leaves that an error message can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree


def flatten(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Leaves and structure; ``None`` is a leaf, so that it can be refused by its path."""
    return optree.tree_flatten(tree, none_is_leaf=True)


def unflatten(spec: optree.PyTreeSpec, leaves: Sequence[Any]) -> Any:
    """The inverse of :func:`flatten`."""
    return optree.tree_unflatten(spec, leaves)


def structure(tree: Any) -> optree.PyTreeSpec:
    """The structure alone."""
    return optree.tree_structure(tree, none_is_leaf=True)


def path_strings(tree: Any) -> list[str]:
    """Each leaf's path joined with slashes.

    >>> path_strings({"blocks": [{"w": 1}], "head": 2})
    ['blocks/0/w', 'head']
    """
    accessors = optree.tree_accessors(tree, none_is_leaf=True)
    return [
        "/".join(str(getattr(entry, "field", entry.entry)) for entry in accessor)
        for accessor in accessors
    ]


def show(path: str, root: str = "params") -> str:
    """A slash path as the expression a reader would type.

    >>> show("blocks/3/w1")
    "params['blocks'][3]['w1']"
    """
    parts = [part for part in path.split("/") if part]
    return root + "".join(f"[{part}]" if part.isdigit() else f"[{part!r}]" for part in parts)


def describe_difference(found: Any, expected: Any, root: str = "params") -> str:
    """Which leaves two trees do not share, for an error message."""
    have, want = set(path_strings(found)), set(path_strings(expected))
    lines = [f"  missing {show(path, root)}" for path in sorted(want - have)]
    lines += [f"  unexpected {show(path, root)}" for path in sorted(have - want)]
    if not lines:
        lines = [f"  found {structure(found)}", f"  expected {structure(expected)}"]
    return "\n".join(lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else []))
