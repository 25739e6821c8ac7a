"""The printed plan: bytes per rank and label, and that what it says is sent is what travels."""

from __future__ import annotations

import math

import pytest
import torch
from budget import one_in
from hypothesis import given
from torch import Tensor

from sharding import (
    Comm,
    Mesh,
    Plan,
    Precision,
    expert_parallel,
    make_plan,
    replicated,
    sharded,
    simulate,
    zero3,
)
from sharding.footprint import _sent
from sharding.sharded import Backward
from sharding.testing import Event, Recording, exact_params, meshes, plans

MESH = Mesh(edp=2, ep=2)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


def test_the_printed_table() -> None:
    params = {"expert": torch.zeros(8, 64, 64), "dense": [torch.zeros(33, 3), torch.zeros(64)]}
    labels = {"expert": "expert", "dense": ["dense", "norm"]}
    rules = RULES | {"norm": replicated()}
    plan = make_plan(params, labels, rules, MESH, {"expert": Precision(torch.bfloat16)})
    assert str(plan) == (
        "Plan on Mesh(edp=2, ep=2), per rank\n"
        "label   leaves  entries  rule                             stored    view      sent/step\n"
        "dense   1       99       compute=- store=edp,ep copies=-  100 B     396 B     900 B\n"
        "expert  1       32,768   compute=ep store=edp copies=-    32.0 KiB  32.0 KiB  64.0 KiB\n"
        "norm    1       64       compute=- store=- copies=edp,ep  256 B     256 B     384 B"
    )


def bytes_sent(event: Event, mesh: Mesh, itemsize: int) -> int:
    """What a rank sends to the others of its fiber; sums go round a ring of them."""
    n = mesh.count(event.op.axes)
    total = sum(map(math.prod, event.shapes)) * itemsize
    shares = {"all_gather": n - 1, "reduce_scatter": (n - 1) / n, "all_reduce": 2 * (n - 1) / n}
    return round(total * shares[event.op.kind])


def traffic(plan: Plan, backward: Backward) -> list[int]:
    """The bytes that each rank sends in a forward and a backward pass."""

    def program(comm: Comm) -> int:
        recording = Recording(comm)
        shards = [x.requires_grad_() for x in plan.shard(exact_params(plan, 0), comm)]

        def loss(views: list[Tensor]) -> Tensor:
            return torch.stack([(view * view).sum() for view in views]).sum()

        sharded(loss, plan, recording, backward)(shards).backward()
        return sum(bytes_sent(e, plan.mesh, 8) for e in recording.events if e.what == "start")

    return simulate(program, plan.mesh)


def check_sent(plan: Plan, backward: Backward = "regather") -> None:
    """The bytes of the table are those that travel, but for rounding by a byte a leaf."""
    for found in traffic(plan, backward):
        assert abs(found - sum(map(_sent, plan.layouts))) <= len(plan.leaves)


@one_in(2)
@given(meshes().flatmap(plans))
def test_what_the_table_says_is_sent_is_what_travels(plan: Plan) -> None:
    check_sent(plan)


def test_a_gather_too_few_is_rejected() -> None:
    leaf = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        check_sent(make_plan([leaf], ["dense"], {"dense": zero3("ep")}, Mesh(ep=2)), "keep")
