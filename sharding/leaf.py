"""Leaf: what a plan knows of one tensor, and what is refused when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .mesh import Mesh
from .rule import Rule, Shape
from .tree import show


@dataclass(frozen=True)
class Leaf:
    """What a plan knows of one tensor of the params.

    >>> print(Leaf("blocks/0/w1", (8, 64), torch.float32, "expert"))
    params['blocks'][0]['w1'] (8, 64)
    """

    path: str
    shape: Shape
    dtype: torch.dtype
    label: str

    def __str__(self) -> str:
        return f"{show(self.path)} {self.shape}"


def refuse_repeated(paths: list[str]) -> None:
    """Refuse two leaves of one path: optimizer state and checkpoints know a leaf by it."""
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"two leaves have the path {path!r}: rename a key; '/' joins keys")
        seen.add(path)


def make_leaf(path: str, x: Any, label: Any, rules: Mapping[str, Rule], mesh: Mesh) -> Leaf:
    """What a plan knows of ``x``, or an error that names what is wrong with it."""
    where = show(path)
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{where} is {x!r}: a parameter is a floating-point tensor. Leave out what is no "
            "parameter, and pass constants to the loss as arguments"
        )
    leaf = Leaf(path, tuple(x.shape), x.dtype, label)
    if not x.is_floating_point():
        raise ValueError(f"{leaf} is {x.dtype}: a parameter has a floating-point dtype")
    if label not in rules:
        raise ValueError(
            f"{leaf} has the label {label!r}, which has no rule: rules are for {list(rules)}"
        )
    ranks = mesh.count(rules[label].compute)
    if ranks > 1 and (not leaf.shape or leaf.shape[0] % ranks):
        raise ValueError(
            f"{leaf}, label {label!r}: dim 0 must divide by the {ranks} ranks of the compute axes "
            f"{rules[label].compute} of {mesh}. Choose a mesh whose "
            f"{'*'.join(rules[label].compute)} divides {leaf.shape[0] if leaf.shape else 'it'}, "
            "or label the leaf otherwise"
        )
    return leaf
