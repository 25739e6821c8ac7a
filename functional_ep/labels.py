"""Labels: which rule and which optimizer a leaf follows, by its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from sharding.tree import flatten, path_strings, unflatten


def label_by_path(patterns: Mapping[str, str], default: str | None = None) -> Callable[[Any], Any]:
    """``params -> labels``: for each leaf the label of the first pattern that matches its path.

    A path is the keys joined with slashes, ``blocks/0/experts/down``; a pattern is a glob in which
    ``*`` crosses slashes.

    Args:
        patterns: label by pattern, in order of precedence.
        default: the label of leaves that no pattern matches; without one there must be none.

    Raises:
        ValueError: a pattern that matches no leaf, or a leaf that no pattern matches.

    >>> params = {"head": 0, "experts": {"down": 1}}
    >>> label_by_path({"experts/*": "expert"}, default="dense")(params)
    {'head': 'dense', 'experts': {'down': 'expert'}}
    """

    def labels(params: Any) -> Any:
        paths = path_strings(params)
        _, spec = flatten(params)
        used: set[str] = set()
        found: list[str] = []
        for path in paths:
            matching = [pattern for pattern in patterns if fnmatchcase(path, pattern)]
            used.update(matching)
            if not matching and default is None:
                raise ValueError(
                    f"no pattern matches {path!r}: add one, or a default label. "
                    f"The patterns are {list(patterns)}"
                )
            found.append(patterns[matching[0]] if matching else str(default))
        for pattern in patterns:
            if pattern not in used:
                near = get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
                raise ValueError(f"the pattern {pattern!r} matches no leaf; paths look like {near}")
        return unflatten(spec, found)

    return labels
