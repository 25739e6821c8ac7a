"""Labels: which rule and which optimizer a leaf follows, by its path; and which are not trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from sharding import Rule
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
        _refuse_unused([pattern for pattern in patterns if pattern not in used], paths)
        return unflatten(spec, found)

    return labels


FROZEN = ", frozen"


class Selection(NamedTuple):
    """Labels and rules of which some are frozen, as :func:`sharding.make_plan` takes them."""

    labels: Any
    rules: dict[str, Rule]
    frozen: tuple[str, ...]


def train_only(labels: Any, rules: Mapping[str, Rule], *patterns: str) -> Selection:
    """``"LABEL, frozen"`` instead of ``LABEL`` for every leaf that no pattern matches.

    What is frozen follows the rule that it had. See :func:`label_by_path` for patterns.

    Args:
        labels: a pytree of labels in the shape of the params.
        rules: one for each of them.
        patterns: of the paths of what is trained.

    What was frozen before stays so: selections may follow one another.

    Raises:
        ValueError: a pattern that matches no leaf.
        TypeError: labels that are a function of the params, or patterns in a list.

    >>> from sharding import replicated
    >>> rules = {"dense": replicated()}
    >>> labels, rules, frozen = train_only({"a": "dense", "b": "dense"}, rules, "a")
    >>> labels, frozen
    ({'a': 'dense', 'b': 'dense, frozen'}, ('dense, frozen',))
    >>> list(rules)  # plan = make_plan(params, labels, rules, mesh, frozen=frozen)
    ['dense', 'dense, frozen']
    """
    return _select(labels, rules, patterns, freeze=False)


def freeze(labels: Any, rules: Mapping[str, Rule], *patterns: str) -> Selection:
    """``"LABEL, frozen"`` instead of ``LABEL`` for every leaf that a pattern matches.

    Everything else is trained: the complement of :func:`train_only`.

    >>> from sharding import replicated
    >>> freeze({"a": "dense", "b": "dense"}, {"dense": replicated()}, "a").labels
    {'a': 'dense, frozen', 'b': 'dense'}
    """
    return _select(labels, rules, patterns, freeze=True)


def _select(
    labels: Any, rules: Mapping[str, Rule], patterns: Sequence[str], freeze: bool
) -> Selection:
    if callable(labels):
        raise TypeError("labels are a function here: give the labels that it makes, labels(params)")
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"patterns are strings, one after the other, not {patterns[0]!r}: unpack it"
        )
    leaves, spec = flatten(labels)
    paths = path_strings(labels)
    _refuse_unused([p for p in patterns if not any(fnmatchcase(x, p) for x in paths)], paths)
    chosen = [any(fnmatchcase(path, pattern) for pattern in patterns) for path in paths]
    named = [
        label + FROZEN if matches == freeze and not label.endswith(FROZEN) else label
        for label, matches in zip(leaves, chosen, strict=True)
    ]
    both = {name: rule for label, rule in rules.items() for name in (label, label + FROZEN)}
    used = {name: rule for name, rule in both.items() if name in set(named)}
    frozen = tuple(name for name in used if name.endswith(FROZEN))
    return Selection(unflatten(spec, named), used, frozen)


def _refuse_unused(unused: Sequence[str], paths: Sequence[str]) -> None:
    for pattern in unused:
        near = get_close_matches(pattern, paths, n=3, cutoff=0.3) or list(paths[:3])
        raise ValueError(f"the pattern {pattern!r} matches no leaf; paths look like {near}")
