"""The inner product of trees of shards is that of the whole trees; so are its derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_close
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharding import Comm, Mesh, Plan, dot, inner, make_plan, replicated, simulate, zero3
from sharding.testing import exact_params, meshes, plans, seeds
from sharding.tree import flatten

MIXED = Mesh(edp=2, ep=2)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Plan, int]:
    return draw(plans(draw(meshes()))), draw(seeds())


def whole_dot(a: Any, b: Any) -> Tensor:
    pairs = zip(flatten(a)[0], flatten(b)[0], strict=True)
    return torch.stack([(x * y).sum() for x, y in pairs]).sum()


def padded(comm: Comm, plan: Plan, tree: Any) -> Any:
    """Shards whose padding holds numbers, as a random tangent's may."""
    leaves: list[Tensor] = []
    for x, layout in zip(plan.flatten(plan.shard(tree, comm)), plan.layouts, strict=True):
        start, end = layout.interval(comm.rank)
        leaves.append(torch.where(torch.arange(len(x)) < end - start, x, 7.0))
    return plan.unflatten(leaves)


def check_dot(plan: Plan, seed: int) -> None:
    a, b = exact_params(plan, seed), exact_params(plan, seed + 100)

    def program(comm: Comm) -> Tensor:
        return dot(padded(comm, plan, a), padded(comm, plan, b), plan, comm)

    for found in simulate(program, plan.mesh):
        assert_close(found, whole_dot(a, b), "dot", rtol=1e-12)


@given(drawn())
def test_every_entry_counts_once(drawn: tuple[Plan, int]) -> None:
    check_dot(*drawn)


def norm_of_tanh(a: Any, b: Any) -> Any:
    return [x.tanh() * y for x, y in zip(a, b, strict=True)]


def check_derivatives(plan: Plan, seed: int, run: Any = simulate) -> None:
    """``d dot(f(a), b) / da``, and its derivative along b: of shards what they are of the whole."""
    a, b = exact_params(plan, seed), exact_params(plan, seed + 100)

    def gradient(a: Any, b: Any, product: Any) -> Any:
        return torch.func.grad(lambda a: product(norm_of_tanh(a, b), a))(a)

    def along(a: Any, b: Any, product: Any) -> Any:
        return torch.func.jvp(lambda a: gradient(a, b, product), (a,), (b,))

    expected = along(a, b, whole_dot)
    for found in run(derivatives_of, plan.mesh, *[[x] * plan.mesh.size for x in (plan, a, b)]):
        for name, tree, whole in zip(("gradient", "along"), found, expected, strict=True):
            for x, y in zip(tree, whole, strict=True):
                assert_close(x, y, name, rtol=1e-12)


def derivatives_of(comm: Comm, plan: Plan, a: Any, b: Any) -> tuple[Any, Any]:
    a, b = plan.shard(a, comm), plan.shard(b, comm)

    def gradient(a: Any) -> Any:
        return torch.func.grad(lambda a: dot(norm_of_tanh(a, b), a, plan, comm))(a)

    both: Any = torch.func.jvp(gradient, (a,), (b,))
    value, tangent = both
    return plan.full(value, comm), plan.full(tangent, comm)


@given(drawn())
def test_derivatives_are_those_of_the_whole(drawn: tuple[Plan, int]) -> None:
    check_derivatives(*drawn)


def a_plan() -> Plan:
    params = [torch.empty(5, dtype=torch.float64), torch.empty(3, dtype=torch.float64)]
    rules = {"dense": zero3("edp"), "copied": replicated()}
    return make_plan(params, ["dense", "copied"], rules, MIXED)


def test_real_ranks_agree(ranks4: Farm) -> None:
    check_derivatives(a_plan(), 0, ranks4.run)


def counts_all_copies(parts: Any, copies: Any, comm: Comm) -> Tensor:
    return torch.stack(list(parts)).sum()


def forgets_other_copies(parts: Any, copies: Any, comm: Comm) -> Tensor:
    return torch.stack([x * c.counts for x, c in zip(parts, copies, strict=True)]).sum()


def test_wrong_sums_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "counted_once", counts_all_copies)
    with pytest.raises(AssertionError, match="dot: off by"):
        check_dot(a_plan(), 0)
    monkeypatch.setattr(inner, "counted_once", forgets_other_copies)
    check_dot(a_plan(), 0)
    with pytest.raises(AssertionError, match="gradient: off by"):
        check_derivatives(a_plan(), 0)


def test_many_narrow_addends_keep_their_digits() -> None:
    n = 3 << 20  # at once, they add up to 3e-4 too much
    plan = make_plan([torch.empty(n)], ["dense"], {"dense": zero3("edp")}, Mesh(edp=1))
    ones = [torch.full((n,), 0.1)]
    (found,) = simulate(lambda comm: dot(ones, ones, plan, comm), plan.mesh)
    assert_close(found, n * ones[0][0].double() ** 2, "dot", rtol=5e-5)
    half = [ones[0].bfloat16()]
    (found,) = simulate(lambda comm: dot(half, ones, plan, comm), plan.mesh)
    assert_close(found, n * half[0][0].double() * ones[0][0].double(), "dot", rtol=5e-5)


def test_trees_that_are_no_shards_are_refused() -> None:
    plan = a_plan()

    def program(comm: Comm) -> Any:
        shards = plan.shard(exact_params(plan, 0), comm)
        return dot(shards, shards[:1], plan, comm)

    with pytest.raises(ValueError, match="b do not have the structure of the plan"):
        simulate(program, MIXED)
    with pytest.raises(ValueError, match="the plan was made for"):
        simulate(lambda comm: dot([], [], plan, comm), Mesh(ep=4))
