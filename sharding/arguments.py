"""What a plan is made of besides leaves, and what of it is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from .gather import Precision
from .mesh import Mesh
from .rule import Rule
from .tree import describe_difference, structure


def check_kinds(rules: Any, mesh: Any) -> None:
    """Refuse what is no dict of rules, or no mesh, and axes that the mesh has not."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={mesh!r}: a Mesh is needed, such as Mesh(edp=2, ep=4)")
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules={rules!r}: a dict of one Rule for each label is needed")
    for label, rule in rules.items():
        if not isinstance(rule, Rule):
            raise TypeError(f"rules[{label!r}] = {rule!r}: a Rule is needed, such as zero3('edp')")
        try:
            mesh.check(rule.axes)
        except ValueError as error:
            raise ValueError(f"rules[{label!r}] = {rule}: {error}") from None


def check_structure(labels: Any, params: Any) -> None:
    """Refuse labels that are no tree in the shape of the params."""
    if structure(labels) == structure(params):
        return
    if isinstance(labels, str):
        raise ValueError(
            f"the labels are {labels!r}, and have to be a tree in the shape of the params, or a "
            f"function that makes one: label_by_path({{}}, default={labels!r})"
        )
    raise ValueError("labels and params differ:\n" + describe_difference(labels, params))


def precision_by_label(precision: Any, rules: Mapping[str, Rule]) -> dict[str, Precision]:
    """That of each label; a label that is not there has what its leaves have."""
    if precision is None:
        return {}
    found = dict.fromkeys(rules, precision) if isinstance(precision, Precision) else precision
    right = "Precision(compute=torch.bfloat16), for all labels or in a dict by label"
    if not isinstance(found, Mapping):
        raise TypeError(f"precision={precision!r}: wanted is {right}")
    for label, each in found.items():
        if not isinstance(each, Precision):
            raise TypeError(f"precision[{label!r}] = {each!r}: wanted is {right}")
        if label not in rules:
            raise ValueError(f"precision[{label!r}]: no such label; rules are for {list(rules)}")
        for name, dtype in each._asdict().items():
            floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
            if not floating and dtype is not None:
                raise TypeError(f"Precision({name}={dtype!r}): a floating-point dtype is needed")
    return dict(found)


def frozen_labels(frozen: Collection[str], rules: Mapping[str, Rule]) -> frozenset[str]:
    """The labels that are not trained."""
    if isinstance(frozen, str):
        raise ValueError(f"frozen={frozen!r}: labels are needed, not a string: write ({frozen!r},)")
    unknown = [label for label in frozen if label not in rules]
    if unknown:
        raise ValueError(f"frozen names {unknown[0]!r}: no such label; rules are for {list(rules)}")
    return frozenset(frozen)
