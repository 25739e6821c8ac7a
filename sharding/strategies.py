"""Hypothesis strategies for meshes, rules, shapes and plans, and random numbers that add exactly.

Hypothesis draws the structure; one integer seed supplies the numbers. So a failure shrinks to a
small mesh and a small shape, and nothing is filtered out: what is drawn fits together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from .mesh import Axes, Mesh
from .plan import Leaf, Plan
from .rule import Rule, Shape

AXES = ("edp", "ep", "tp")
SIZES = (0, 1, 2, 3, 5, 7, 4, 13)  # of a dim: none, one, primes, powers of two; simplest first


class Case(NamedTuple):
    """A leaf under a rule on a mesh, and the seed of its entries: what the laws are about."""

    rule: Rule
    mesh: Mesh
    shape: Shape
    seed: int = 0


def exact(shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random ``k / 8`` with ``|k| <= 8``: sums and small products of float64 have no rounding.

    >>> exact((4,), seed=0)
    tensor([-0.1250, -0.6250,  0.5000,  1.0000], dtype=torch.float64)
    """
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=stream).to(dtype) / 8


def exact_params(plan: Plan, seed: int) -> Any:
    """Global params for a plan, with entries from :func:`exact`."""
    return plan.unflatten(
        [exact(leaf.shape, seed + i, leaf.dtype) for i, leaf in enumerate(plan.leaves)]
    )


def seeds() -> st.SearchStrategy[int]:
    """The one number from which all numbers of an example come."""
    return st.integers(0, 2**20)


@st.composite
def meshes(draw: st.DrawFn, max_ranks: int = 8, axes: Axes | None = None) -> Mesh:
    """Meshes of up to ``max_ranks`` ranks; with ``axes``, of just these axes in any order.

    >>> from hypothesis import find
    >>> sorted(find(meshes(), lambda mesh: mesh.size == 6 and len(mesh.axes) == 2).axes)
    ['edp', 'ep']
    """
    names = draw(st.permutations(AXES if axes is None else axes))
    if axes is None:
        names = names[: draw(st.integers(0, len(AXES)))]
    sizes: dict[str, int] = {}
    for i, name in enumerate(names):
        for_the_rest = 2 ** (len(names) - i - 1)  # an axis of one rank makes laws easy to obey
        sizes[name] = draw(st.integers(1, max(1, max_ranks // for_the_rest)))
        max_ranks //= sizes[name]
    return Mesh(**sizes)


@st.composite
def axes_of(draw: st.DrawFn, mesh: Mesh) -> Axes:
    """Some axes of a mesh, in any order."""
    return tuple(draw(st.permutations(mesh.axes))[: draw(st.integers(0, len(mesh.axes)))])


@st.composite
def rules(draw: st.DrawFn, mesh: Mesh) -> Rule:
    """Rules on a mesh: each axis splits for computing or for storing, or holds copies."""
    split = draw(axes_of(mesh))
    compute = draw(st.integers(0, len(split)))
    return Rule(split[:compute], split[compute:])


@st.composite
def shapes(draw: st.DrawFn, multiple: int = 1, max_dims: int = 3) -> Shape:
    """Shapes whose dim 0 is a multiple, such as of the ranks of the compute axes.

    Scalars where the multiple is one; sizes are zero, one, primes and powers of two.
    """
    dims = draw(st.integers(0 if multiple == 1 else 1, max_dims))
    sizes = [draw(st.sampled_from(SIZES)) for _ in range(dims)]
    return tuple(size * multiple if i == 0 else size for i, size in enumerate(sizes))


@st.composite
def cases(draw: st.DrawFn, max_ranks: int = 8, rule: Rule | None = None) -> Case:
    """A mesh, a rule on it and a shape that fits; with ``rule``, meshes on which it makes sense.

    >>> from hypothesis import find
    >>> find(cases(), lambda case: len(case.rule.copies(case.mesh)) == 1).rule
    Rule(compute=(), store=())
    """
    if rule is None:
        mesh = draw(meshes(max_ranks))
        rule = draw(rules(mesh))
    else:
        unused = [name for name in (*AXES, "copies") if name not in rule.axes][:1]
        mesh = draw(meshes(max_ranks, rule.axes + tuple(unused[: draw(st.integers(0, 1))])))
    shape = draw(shapes(mesh.count(rule.compute)))
    return Case(rule, mesh, shape, draw(seeds()))


@st.composite
def plans(
    draw: st.DrawFn,
    mesh: Mesh,
    max_leaves: int = 4,
    labels: tuple[str, ...] = ("dense", "expert"),
    dtype: torch.dtype = torch.float64,
) -> Plan:
    """Plans of a list of one to ``max_leaves`` leaves, each with one of the labels."""
    by_label = {label: draw(rules(mesh)) for label in labels}
    leaves: list[Leaf] = []
    for i in range(draw(st.integers(1, max_leaves))):
        label = draw(st.sampled_from(labels))
        shape = draw(shapes(mesh.count(by_label[label].compute), max_dims=2))
        leaves.append(Leaf(str(i), shape, dtype, label))
    used = {leaf.label for leaf in leaves}
    return Plan(leaves, {label: r for label, r in by_label.items() if label in used}, mesh)
