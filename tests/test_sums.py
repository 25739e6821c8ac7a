"""What a step sums over ranks and microbatches: right in whatever dtype a loss gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from functional_ep import adamw, init_state, make_train_step, sgd
from sharding import Comm, Mesh, make_plan, sharded, simulate, zero3

PARAMS = {"w": torch.tensor([1.0, -2.0, 3.0, 4.0])}


def metrics_of(total: float, count: Any, aux: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Of a step of two ranks that each say so twice, once for each microbatch."""
    plan = make_plan(PARAMS, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))

    def program(comm: Comm) -> dict[str, Tensor]:
        def loss(view: dict[str, Tensor], _: Any) -> tuple[Any, ...]:
            return total + 0 * view["w"].sum(), count, aux or {}

        step = make_train_step(sharded(loss, plan, comm), plan, sgd(0.1), comm)
        return step(init_state(plan.shard(PARAMS, comm), plan, sgd(0.1)), None, None)[1]

    return simulate(program, plan.mesh)[0]


@pytest.mark.parametrize(
    ("count", "all_of_them"),
    [
        (3, 12),
        (torch.tensor(200, dtype=torch.uint8), 800),
        (torch.tensor(100, dtype=torch.int8), 400),
        (torch.tensor(True), 4),
        (torch.tensor(257.0, dtype=torch.bfloat16).double(), 4 * 256),
        (torch.tensor(255.0, dtype=torch.bfloat16), 4 * 255),
        (torch.tensor(0.1, dtype=torch.float64), 0.4),
    ],
)
def test_a_count_of_any_dtype_is_the_sum_of_all(count: Any, all_of_them: float) -> None:
    metrics = metrics_of(2.0, count)
    assert float(metrics["count"]) == pytest.approx(all_of_them, rel=1e-12)
    assert float(metrics["loss"]) == pytest.approx(8 / all_of_them, rel=1e-6)


def test_a_loss_without_a_count_is_not_divided_by_it() -> None:
    assert float(metrics_of(0.0, 0)["loss"]) == 0.0


def test_aux_of_any_dtype_is_the_sum_of_all() -> None:
    seen = {
        "seen": torch.tensor([True, False]),
        "small": torch.tensor(100, dtype=torch.uint8),
        "half": torch.tensor(2049.0, dtype=torch.float16).float().half() + 0,
    }
    metrics = metrics_of(1.0, 1, seen)
    assert metrics["seen"].tolist() == [4, 0] and int(metrics["small"]) == 400
    assert float(metrics["half"]) == 4 * 2048


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("optimizer", [adamw(0.1), sgd(0.1, momentum=0.9)])
def test_a_state_does_not_hold_on_to_how_it_was_made(donate: bool, optimizer: Any) -> None:
    """Even if its params are told that they require a gradient."""
    plan = make_plan(PARAMS, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))

    def program(comm: Comm, x: Tensor, requires_grad: bool) -> Tensor:
        loss = sharded(lambda view, x: ((view["w"] * x).square().sum(), 1), plan, comm)
        step = make_train_step(loss, plan, optimizer, comm, clip=1.0, donate=donate)
        shards = plan.shard(PARAMS, comm)
        state = init_state({"w": shards["w"].requires_grad_(requires_grad)}, plan, optimizer)
        for _ in range(2):
            state, metrics = step(state, x)
            held = [state.params["w"], *(m["w"] for m in state.opt["dense"].values())]
            assert not any(y.requires_grad for y in (*held, *metrics.values()))
        return state.params["w"]

    x = torch.tensor([1.0, 2.0])
    found, expected = (simulate(program, plan.mesh, x, [r] * 2) for r in (True, False))
    assert torch.equal(found[0], expected[0])
