"""T4: the global norm is the norm of the whole gradient, on all ranks; clipping commutes with P."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_close, assert_rejects
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep.norm import global_norm
from functional_ep.step_by_label import EPS
from sharding import Comm, Mesh, Plan, simulate
from sharding.plan import Copy
from sharding.testing import exact_params, meshes, plans, seeds


@st.composite
def gradients(draw: st.DrawFn) -> tuple[Plan, int]:
    return draw(plans(draw(meshes()))), draw(seeds())


@given(gradients())
def test_norm_counts_every_entry_once(drawn: tuple[Plan, int]) -> None:
    plan, seed = drawn
    whole = exact_params(plan, seed)

    def norm(comm: Comm) -> Tensor:
        shards = plan.flatten(plan.shard(whole, comm))
        return global_norm(shards, plan.copies(comm), comm)

    expected = torch.cat([x.reshape(-1) for x in plan.flatten(whole)]).norm()
    found = simulate(norm, plan.mesh)
    for each in found:
        assert torch.equal(each, found[0]), "ranks disagree on the norm"
        assert_close(each, expected, "norm", rtol=1e-12)


@given(gradients(), st.sampled_from([0.01, 1.0, 1e6]))
def test_clipping_commutes_with_partition(drawn: tuple[Plan, int], clip: float) -> None:
    plan, seed = drawn
    whole = exact_params(plan, seed)
    norm = math.sqrt(sum(float(x.square().sum()) for x in plan.flatten(whole)))
    factor = min(1.0, clip / (norm + EPS))

    def clipped(comm: Comm) -> list[Tensor]:
        shards = plan.flatten(plan.shard(whole, comm))
        found = global_norm(shards, plan.copies(comm), comm)
        return plan.flatten(
            plan.full(
                plan.unflatten([g * (clip / (found + EPS)).clamp(max=1) for g in shards]), comm
            )
        )

    for each in simulate(clipped, plan.mesh):
        for found, x in zip(each, plan.flatten(whole), strict=True):
            assert_close(found, factor * x, "clipped gradient", rtol=1e-12)


def test_tolerance_rejects_a_norm_that_counts_copies_twice() -> None:
    x = torch.ones(4, dtype=torch.float64)
    assert_rejects(torch.cat([x, x]).norm(), x.norm(), "norm", rtol=1e-12)


def test_norm_of_many_entries_keeps_its_digits() -> None:
    """Sixteen running sums of float32 would be wrong by more than 1e-5 after so many addends."""
    g = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    mesh = Mesh(edp=1)
    found = simulate(lambda comm: global_norm([g], [Copy((), True)], comm), mesh)[0]
    expected = g.double().norm()
    assert_close(found, expected, "norm", rtol=2e-7)
    assert_rejects(expected * (1 + 1e-6), expected, "norm", rtol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_short_floats_is_summed_in_longer_ones(dtype: torch.dtype) -> None:
    """In float16 squares end at 65504; without a vote, clipping by infinity would lose the step."""
    g = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = simulate(lambda comm: global_norm([g], [Copy((), True)], comm), Mesh())[0]
    expected = g.double().norm()
    assert_close(found, expected, "norm", rtol=1e-5)
    assert_rejects(torch.dot(g, g).double().sqrt(), expected, "norm", rtol=1e-5)
