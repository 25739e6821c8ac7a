"""Simulated and real ranks run the same program: trainings on gloo, to the last digits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_close
from farm import Farm
from hypothesis import given, settings
from laws import uneven
from torch import Tensor

from functional_ep import lm
from functional_ep.testing import Training, program, trainings
from sharding import Comm, Mesh, simulate
from sharding.tree import flatten


def leaves_of(comm: Comm, case: Training) -> list[Tensor]:
    """Every number that a training comes to, as one list."""
    torch.set_num_threads(1)
    trained = program(comm, case)
    return flatten((trained.params, trained.metrics, trained.state))[0]


def compare(farm: Farm, case: Training) -> None:
    ranks = case.mesh.size
    real = farm.run(leaves_of, case.mesh, [case] * ranks)
    simulated = simulate(leaves_of, case.mesh, [case] * ranks)
    for rank, (found, expected) in enumerate(zip(real, simulated, strict=True)):
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            assert_close(x, y, f"leaf {i} on rank {rank}", rtol=1e-12)


@pytest.mark.parametrize("mesh", [Mesh(edp=1, ep=2), Mesh(edp=2, ep=1)], ids=repr)
@pytest.mark.parametrize("backward", ["keep", "regather", "recompute"])
def test_two_ranks(ranks2: Farm, mesh: Mesh, backward: Any) -> None:
    sizes = ((((2, 3), (0, 1)), ((1, 2), (1, 3))),) * 2
    compare(ranks2, replace(uneven(clip=0.05), mesh=mesh, sizes=sizes, backward=backward))


@pytest.mark.parametrize(
    "mesh", [Mesh(edp=2, ep=2), Mesh(edp=1, ep=4), Mesh(ep=2, edp=2)], ids=repr
)
def test_four_ranks(ranks4: Farm, mesh: Mesh) -> None:
    compare(ranks4, replace(uneven(clip=0.05, balance=0.5), mesh=mesh, donate=True))


def test_random_trainings(ranks2: Farm) -> None:
    @settings(max_examples=12)
    @given(trainings(max_ranks=2))
    def law(case: Training) -> None:
        if case.mesh.size == 1:
            case = case.on(Mesh(edp=2, ep=1))
        compare(ranks2, case)

    law()


def hvp(comm: Comm, batch: dict[str, Tensor]) -> Any:
    """A product with the Hessian of the loss, on real ranks."""
    from sharding import expert_parallel, make_plan, zero3

    cfg = lm.Config(vocab=7, dim=4, layers=1, heads=1, experts=2, top_k=2, ffn=3)
    params = lm.init(cfg, 0, torch.float64)
    rules = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
    plan = make_plan(params, lm.labels, rules, comm.mesh)
    loss, shards = lm.loss(cfg, plan, comm), plan.shard(params, comm)
    grad = torch.func.grad(lambda s: loss(s, batch)[0])
    return plan.full(torch.func.jvp(grad, (shards,), (shards,))[1], comm)


def test_second_derivatives_of_the_model(ranks2: Farm) -> None:
    ids = torch.arange(12).view(4, 3) % 7
    batch = {"input_ids": ids, "labels": ids.flip(0)}
    halves = [{name: x[:1] for name, x in batch.items()}, {n: x[1:] for n, x in batch.items()}]
    (whole,) = simulate(hvp, Mesh(edp=1, ep=1), [batch])
    for found in ranks2.run(hvp, Mesh(edp=1, ep=2), halves):
        for x, y in zip(flatten(found)[0], flatten(whole)[0], strict=True):
            assert_close(x, y, "hvp")
