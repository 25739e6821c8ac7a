"""The strategies reach the hard cases, and check_rule finds what is wrong with a rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from dense import Sample, samples
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from sharding import Mesh, Plan, Rule, expert_parallel, interval, partition, replicated, zero3
from sharding.mesh import Axes
from sharding.rule import Shape, shard_size, view_shape
from sharding.testing import (
    Case,
    Functions,
    cases,
    check_rule,
    exact,
    meshes,
    plans,
    rules,
    seeds,
    shapes,
)

SEARCH = settings(max_examples=2000, database=None, derandomize=True, phases=[Phase.generate])


def padding(case: Case) -> int:
    rule, mesh, shape, _ = case
    stored = shard_size(rule, mesh, shape) * mesh.count(rule.store)
    return stored - math.prod(view_shape(rule, mesh, shape))


HARD: dict[str, Callable[[Case], bool]] = {
    "ep > 1 and edp > 1": lambda c: all(dict(c.mesh.sizes).get(a, 1) > 1 for a in ("ep", "edp")),
    "three axes of two ranks": lambda c: [n for _, n in c.mesh.sizes] == [2, 2, 2],
    "no axes": lambda c: c.mesh.axes == (),
    "eight ranks on one axis": lambda c: 8 in dict(c.mesh.sizes).values(),
    "padding": lambda c: padding(c) > 0,
    "a shard of nothing but padding": lambda c: (
        padding(c) > shard_size(c.rule, c.mesh, c.shape) > 0
    ),
    "a leaf of no entries": lambda c: 0 in c.shape,
    "a scalar on several ranks": lambda c: c.shape == () and c.mesh.count(c.rule.store) > 1,
    "primes": lambda c: math.prod(c.shape) in (7, 13) and c.mesh.count(c.rule.store) > 1,
    "copies": lambda c: c.mesh.count(c.rule.copies(c.mesh)) > 1,
    "compute and store": lambda c: all(c.mesh.count(a) > 1 for a in (c.rule.compute, c.rule.store)),
    "compute, store and copies": lambda c: all(
        c.mesh.count(a) > 1 for a in (c.rule.compute, c.rule.store, c.rule.copies(c.mesh))
    ),
    "axes in another order than the mesh's": lambda c: (
        sorted(c.rule.store, key=c.mesh.axes.index) != list(c.rule.store)
        and all(c.mesh[axis] > 1 for axis in c.rule.store)
    ),
    "three dims": lambda c: len(c.shape) == 3 and min(c.shape) > 1,
}


@pytest.mark.parametrize("hard", HARD.values(), ids=HARD.keys())
def test_cases_reach(hard: Callable[[Case], bool]) -> None:
    assert hard(find(cases(), hard, settings=SEARCH))


PLANS: dict[str, Callable[[Plan], bool]] = {
    "labels with rules that differ": lambda p: len({p.rules[label] for label in p.labels}) == 2,
    "a label alone": lambda p: len(p.labels) == 1,
    "leaves of a label next to others": lambda p: (
        [leaf.label for leaf in p.leaves] == ["dense", "expert", "dense"]
    ),
}


@pytest.mark.parametrize("hard", PLANS.values(), ids=PLANS.keys())
def test_plans_reach(hard: Callable[[Plan], bool]) -> None:
    assert hard(find(meshes().flatmap(plans), hard, settings=SEARCH))


SAMPLES: dict[str, tuple[str, Callable[[Sample], bool]]] = {
    "uneven rows": ("all_to_all", lambda s: len({sum(row) for row in s.rows}) > 1),
    "a rank that sends nothing": ("all_to_all", lambda s: sum(s.rows[0]) == 0 < sum(s.rows[-1])),
    "leaves whose copies differ": (
        "gather",
        lambda s: len({s.mesh.count(rule.copies(s.mesh)) for rule in s.rules}) > 1,
    ),
    "a fiber out of order": (
        "all_gather",
        lambda s: list(s.mesh.fiber(0, s.axes)) != sorted(s.mesh.fiber(0, s.axes)),
    ),
}


@pytest.mark.parametrize(("kind", "hard"), SAMPLES.values(), ids=SAMPLES.keys())
def test_samples_reach(kind: str, hard: Callable[[Sample], bool]) -> None:
    of_kind = meshes(4).flatmap(lambda mesh: samples(mesh, kind))
    assert hard(find(of_kind, hard, settings=SEARCH))


@given(st.data())
def test_what_is_drawn_fits_together(data: st.DataObject) -> None:
    max_ranks = data.draw(st.integers(1, 8))
    mesh = data.draw(meshes(max_ranks))
    assert mesh.size <= max_ranks
    rule = data.draw(rules(mesh))
    mesh.check(rule.axes)
    view_shape(rule, mesh, data.draw(shapes(mesh.count(rule.compute))))


@given(seeds(), shapes(), st.sampled_from([torch.float64, torch.float32]))
def test_exact_numbers_add_to_the_same_bits_in_any_order(
    seed: int, shape: Shape, dtype: torch.dtype
) -> None:
    x = exact(shape, seed, dtype).flatten()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(x, exact(shape, seed, dtype).flatten()) and x.dtype == dtype
    assert torch.equal(x.cumsum(0)[-1:], x[order].cumsum(0)[-1:])
    assert bool(((x * 8) == (x * 8).round()).all()) and bool((x.abs() <= 1).all())


# -- check_rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        replicated(),
        zero3("edp", "ep"),
        expert_parallel("ep", store=("edp",)),
        Rule(compute=("rows", "columns"), store=("depth",)),
        Rule(compute=("copies",), store=("tp",)),
    ],
    ids=repr,
)
def test_check_rule_takes_axes_of_any_name(rule: Rule) -> None:
    check_rule(rule, max_examples=10)


@dataclass(frozen=True)
class ForgetsItsCopies(Rule):
    """Nothing is a copy, so nothing is summed over the axes that are not named."""

    def copies(self, mesh: Mesh) -> Axes:
        return ()


@dataclass(frozen=True)
class CopiesOfItsSlices(Rule):
    """Compute axes are taken for copies as well."""

    def copies(self, mesh: Mesh) -> Axes:
        return mesh.rest(self.store)


@pytest.mark.parametrize("kind", [ForgetsItsCopies, CopiesOfItsSlices])
def test_check_rule_rejects_a_rule_that_miscounts(kind: type[Rule]) -> None:
    with pytest.raises(AssertionError, match=r"L1 tiling|L8 accounting"):
        check_rule(kind(compute=("ep",), store=("edp",)), max_examples=200)


def test_check_rule_rejects_functions_that_are_wrong() -> None:
    def backwards(rule: Rule, mesh: Mesh, rank: int, x: Any) -> Any:
        return partition(rule, mesh, mesh.size - 1 - rank, x)

    def empty(rule: Rule, mesh: Mesh, rank: int, shape: Shape) -> tuple[int, int]:
        lo, _ = interval(rule, mesh, rank, shape)
        return lo, lo

    for functions, law in ((Functions(partition=backwards), "L2"), (Functions(empty), "L1")):
        with pytest.raises(AssertionError, match=law):
            check_rule(zero3("ep"), max_examples=200, functions=functions)
