"""States whose numbers follow from a plan and a seed alone, and plans of the same leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from functional_ep import State
from sharding import Comm, Leaf, Mesh, Plan, Rule, expert_parallel, make_plan, replicated, zero3
from sharding.rule import partition
from sharding.testing import exact, meshes, plans, rules
from sharding.tree import flatten

MOMENTS = ("m", "v")
PARAMS = {
    "w": torch.empty(4, 3, dtype=torch.float64),
    "b": torch.empty(5, dtype=torch.float64),
    "s": torch.empty((), dtype=torch.bfloat16),
    "none": torch.empty(0, 3),
    "kept": torch.empty(7),
}
LABELS = {"w": "expert", "b": "dense", "s": "dense", "none": "dense", "kept": "still"}
MESH = Mesh(edp=2, ep=2)
RULES = {
    "expert": expert_parallel("ep", store=("edp",)),
    "dense": zero3("edp"),
    "still": zero3("ep"),
}


def a_plan(mesh: Mesh = MESH, rules: dict[str, Rule] | None = None) -> Plan:
    """A leaf of every kind: split for computing, split, copied, empty, scalar, frozen."""
    return make_plan(PARAMS, LABELS, rules or RULES, mesh, frozen=("still",))


def alone() -> Plan:
    """The same on one rank."""
    return a_plan(Mesh(), dict.fromkeys(RULES, replicated()))


def state_of(plan: Plan, rank: int, seed: int, moments: tuple[str, ...] = MOMENTS) -> State:
    """A rank's state of the numbers of a seed, which is its step; ``kept`` is always the same."""

    def shard(leaf: Leaf, number: int) -> Tensor:
        whole = exact(leaf.shape, number, leaf.dtype)
        return partition(plan.rules[leaf.label], plan.mesh, rank, whole)

    at = {leaf.path: 1000 * i for i, leaf in enumerate(sorted(plan.leaves, key=lambda x: x.path))}
    params = [
        shard(leaf, at[leaf.path] + (0 if leaf.path == "kept" else seed)) for leaf in plan.leaves
    ]
    opt = {
        label: {
            name: {
                leaf.path: shard(leaf, at[leaf.path] + 100 * (i + 1) + seed)
                for leaf in plan.leaves
                if leaf.label == label
            }
            for i, name in enumerate(moments)
        }
        for label in plan.trained
    }
    return State(torch.tensor(seed), plan.unflatten(params), opt)


def same(found: Any, expected: Any) -> bool:
    """Whether two states have one structure, and the same bits."""
    (xs, spec), (ys, other) = flatten(found), flatten(expected)
    return spec == other and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(xs, ys, strict=True)
    )


class Pair(NamedTuple):
    """Plans of the same leaves on two meshes, of any numbers of ranks."""

    old: Plan
    new: Plan


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Other meshes, rules and labels; what was frozen stays so, and more may be."""
    old = draw(meshes().flatmap(plans))
    old = Plan(old.tree, old.rules, old.mesh, {}, frozenset(old.labels[: draw(st.integers(0, 1))]))
    return Pair(old, draw(others(old)))


@st.composite
def others(draw: st.DrawFn, old: Plan) -> Plan:
    """The same leaves elsewhere."""
    mesh = draw(meshes())
    by_label = {label: draw(rules(mesh)) for label in ("x", "y", "frozen")}
    frozen = draw(st.sampled_from([("frozen",), ("frozen", "y")]))
    leaves: list[Leaf] = []
    for leaf in old.leaves:
        label = "frozen" if leaf.label in old.frozen else draw(st.sampled_from(["x", "y"]))
        leaves.append(Leaf(leaf.path, leaf.shape, leaf.dtype, label))
        ranks = mesh.count(by_label[label].compute)
        if ranks > 1 and (not leaf.shape or leaf.shape[0] % ranks):
            by_label[label] = Rule(store=by_label[label].axes)
    used = {leaf.label for leaf in leaves}
    its = {label: rule for label, rule in by_label.items() if label in used}
    return Plan(leaves, its, mesh, {}, frozenset(used.intersection(frozen)))


def rank_state(comm: Comm, plan: Plan, seed: int) -> State:
    """:func:`state_of` as a program."""
    return state_of(plan, comm.rank, seed)
