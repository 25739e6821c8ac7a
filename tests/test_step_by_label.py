"""From gradients to the next state: what optimizers may return, and what donation leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_ep import (
    Optimizer,
    State,
    Vote,
    adamw,
    constant,
    init_state,
    make_train_step,
    sgd,
    wsd,
)
from functional_ep.optim import Moments
from sharding import Comm, Mesh, Plan, make_plan, sharded, simulate, zero3
from sharding.tree import flatten

PARAMS = {"w": torch.full((4,), 2.0), "base": torch.ones(4)}
LABELS = {"w": "dense", "base": "base"}
RULES = {"dense": zero3("edp"), "base": zero3("edp")}


def a_plan(ranks: int = 1) -> Plan:
    return make_plan(PARAMS, LABELS, RULES, Mesh(edp=ranks), frozen=("base",))


def loss_of(plan: Plan, comm: Comm) -> Callable[..., Any]:
    def loss(view: dict[str, Tensor], x: Tensor) -> tuple[Any, ...]:
        return (view["w"] * view["base"] * x).sum(), torch.tensor(1), {"first": view["w"]}

    return sharded(loss, plan, comm)


# -- donation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vetoed", [False, True])
def test_donating_leaves_frozen_leaves_to_other_states(vetoed: bool) -> None:
    """Two adapters on one base are two states that share it."""

    def program(comm: Comm) -> None:
        plan, tx = a_plan(comm.mesh.size), sgd(0.1)
        loss = loss_of(plan, comm)
        start = init_state(plan.shard(PARAMS, comm), plan, tx)
        other, _ = make_train_step(loss, plan, tx, comm)(start, torch.ones(()))
        assert other.params["base"] is start.params["base"]
        donating = make_train_step(loss, plan, tx, comm, donate=True, commit=Vote("skip"))
        x = torch.full((), torch.nan if vetoed else 1.0)
        after, _ = donating(other, x)
        assert bool(after.params["w"].isfinite().all()) and not other.params["w"].numel()
        assert torch.equal(after.params["base"], start.params["base"])
        assert torch.equal(start.params["base"], torch.ones(4 // comm.mesh.size))

    for ranks in (1, 2):
        simulate(program, Mesh(edp=ranks))


@pytest.mark.parametrize("donate", [False, True])
def test_metrics_share_no_memory_with_state_or_batch(donate: bool) -> None:
    def program(comm: Comm) -> None:
        plan, tx = a_plan(), sgd(0.1)
        step = make_train_step(loss_of(plan, comm), plan, tx, comm, donate=donate)
        state = init_state(plan.shard(PARAMS, comm), plan, tx)
        state, first = step(state, torch.ones(()))
        state, _ = step(state, torch.ones(()))
        assert torch.equal(first["first"], PARAMS["w"])

    simulate(program, Mesh(edp=1))


# -- optimizers of one's own ---------------------------------------------------------------------


def averaging(update: Callable[..., Any], init: Callable[..., Moments] | None = None) -> Optimizer:
    def zeros(params: dict[str, Tensor]) -> Moments:
        return {"mean": {path: torch.zeros_like(p) for path, p in params.items()}}

    return Optimizer(init or zeros, update, lambda step: torch.tensor(0.1))


def one_step(tx: Optimizer) -> State:
    def program(comm: Comm) -> State:
        plan = a_plan()
        step = make_train_step(loss_of(plan, comm), plan, tx, comm)
        return step(init_state(plan.shard(PARAMS, comm), plan, tx), torch.ones(()))[0]

    return simulate(program, Mesh(edp=1))[0]


def right(step: Any, ps: Any, gs: Any, moments: Any, donate: bool, factor: Any) -> Any:
    return [p - 0.1 * g for p, g in zip(ps, gs, strict=True)], moments


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (None, "returned NoneType: an update returns"),
    "no moments": ([torch.ones(4)], "returned list: an update returns"),
    "three": (([], {}, {}), "returned a tuple of 3"),
    "too few leaves": (([], {"mean": [torch.ones(4)]}), "returned 0 leaves as 'params'"),
    "a moment too few": (([torch.ones(4)], {}), r"returned the moments \[\].*\['mean'\]"),
    "another dtype": (
        ([torch.ones(4).double()], {"mean": [torch.ones(4)]}),
        r"returned torch.float64 \(4,\) among 'params', for torch.float32 \(4,\)",
    ),
    "another shape": (
        ([torch.ones(4)], {"mean": [torch.ones(())]}),
        r"returned torch.float32 \(\) among 'mean', for torch.float32 \(4,\)",
    ),
    "a moment's leaf too few": (([torch.ones(4)], {"mean": []}), "returned 0 leaves as 'mean'"),
}


def test_what_an_update_returns_is_checked_where_it_does() -> None:
    assert torch.equal(one_step(averaging(right)).params["w"], PARAMS["w"] - 0.1)
    for result, message in WRONG.values():
        with pytest.raises((TypeError, ValueError), match=rf"optimizers\['dense'\].*{message}"):
            one_step(averaging(lambda *_, result=result: result))


BAD_MOMENTS: dict[str, tuple[Moments, str]] = {
    "the role of parameters": ({"params": {"w": torch.ones(4)}}, "cannot be saved as 'params'"),
    "part of a path": ({"a/b": {"w": torch.ones(4)}}, "nor with a '/', as a path is"),
    "a number": ({"mean": {"w": torch.ones(())}}, r"mean\['w'\] has the shape \(\), its param"),
    "a leaf too few": ({"mean": {}}, r"mean\['w'\] is missing or left over"),
}


@pytest.mark.parametrize("case", BAD_MOMENTS)
def test_moments_are_like_parameters(case: str) -> None:
    moments, message = BAD_MOMENTS[case]
    with pytest.raises(ValueError, match=rf"optimizers\['dense'\].init: .*{message}"):
        one_step(averaging(right, lambda params: moments))


def test_a_state_begins_with_shards() -> None:
    def program(comm: Comm) -> None:
        init_state(PARAMS, a_plan(2), sgd(0.1))

    with pytest.raises(ValueError, match=r"a shard \(2,\) of \(4,\) expected, found \(4,\)"):
        simulate(program, Mesh(edp=2))


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sgd(-0.1), "sgd: lr=-0.1"),
        (lambda: sgd(float("nan")), "sgd: lr=nan"),
        (lambda: sgd(0.1, momentum=-1.0), "sgd: momentum=-1.0"),
        (lambda: sgd(0.1, weight_decay=-1.0), "sgd: weight_decay=-1.0"),
        (lambda: adamw(float("inf")), "adamw: lr=inf"),
        (lambda: adamw(0.1, b1=1.0), r"adamw: b1=1.0: a number from 0 on and below 1"),
        (lambda: adamw(0.1, b2=1.5), "adamw: b2=1.5"),
        (lambda: adamw(0.1, eps=-1e-8), "adamw: eps=-1e-08"),
        (lambda: constant(0.1, warmup=-3), "warmup=-3: the value would start below zero"),
        (lambda: wsd(0.1, warmup=-3, decay=2, total=6), "warmup=-3"),
        (lambda: wsd(0.1, decay=0, total=6), "wsd: decay=0: at least one step"),
    ],
)
def test_numbers_that_climb_or_are_none_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_schedule_may_return_a_number(make: Callable[..., Optimizer]) -> None:
    def number(step: Tensor) -> float:
        return 0.1

    numbers, tensors = make(number), make(0.1)
    assert float(numbers.rate(torch.tensor(0))) == 0.1
    assert torch.equal(one_step(numbers).params["w"], one_step(tensors).params["w"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("count", [10**3, 10**6, 5 * 10**7])
def test_half_precision_takes_the_step_of_float32(
    count: int, momentum: float, dtype: torch.dtype
) -> None:
    """One over the count of tokens is less than what float16 tells from zero."""
    step, p = torch.tensor(0), torch.full((4,), 2.0**-12)
    g = torch.tensor([2e4, -1e4, 3.0, 0.0]).to(dtype)
    tx = sgd(0.5, momentum=momentum)
    factor = torch.tensor(1 / count, dtype=torch.float64)

    def updated(dtype: torch.dtype) -> Tensor:
        zeros = {"m": [torch.zeros(4, dtype=dtype)]} if momentum else {}
        return tx.update(step, [p.to(dtype)], [g.to(dtype)], zeros, False, factor)[0][0]

    found, expected = updated(dtype), updated(torch.float32)
    assert found.dtype == dtype and not torch.equal(expected, p)
    assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("kind", ["the same tensor", "a part of it"])
def test_donating_refuses_memory_that_two_leaves_have(kind: str) -> None:
    """A reference and what begins as a copy of it: the step would train both."""

    def program(comm: Comm) -> None:
        plan, tx = a_plan(), sgd(0.1)
        step = make_train_step(loss_of(plan, comm), plan, tx, comm, donate=True)
        w = torch.ones(4)
        base = w if kind == "the same tensor" else torch.cat([w, w])[2:6]
        shared = {"w": w if base is w else base._base[:4], "base": base}  # pyright: ignore
        with pytest.raises(ValueError, match=r"state.*'(w|base)'\] and .* share memory"):
            step(init_state(shared, plan, tx), torch.ones(()))
        apart = {"w": w.clone(), "base": base.clone()}
        step(init_state(apart, plan, tx), torch.ones(()))

    simulate(program, Mesh(edp=1))


def test_frozen_leaves_may_share_memory() -> None:
    def program(comm: Comm) -> None:
        params = {"w": torch.ones(2), "a": torch.ones(4), "b": torch.ones(4)}
        labels = {"w": "dense", "a": "base", "b": "base"}
        plan = make_plan(params, labels, RULES, comm.mesh, frozen=("base",))
        loss = sharded(lambda view, x: ((view["w"].sum() + view["a"].sum()) * x, 1), plan, comm)
        step = make_train_step(loss, plan, sgd(0.1), comm, donate=True)
        state = init_state({**params, "b": params["a"]}, plan, sgd(0.1))
        assert torch.equal(step(state, torch.ones(()))[0].params["w"], torch.full((2,), 0.9))

    simulate(program, Mesh(edp=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_transform_changes_no_dtype(make: Callable[..., Optimizer], dtype: torch.dtype) -> None:
    """Two steps in half precision can be differentiated; what the first gives is a state."""
    params = {"w": torch.ones(4, dtype=dtype)}
    plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=1))

    def program(comm: Comm) -> None:
        loss = sharded(lambda view, x: ((view["w"] * x).float().square().sum(), 1), plan, comm)
        tx = make(0.1)
        step = make_train_step(loss, plan, tx, comm)
        state, x = init_state(plan.shard(params, comm), plan, tx), torch.ones(4, dtype=dtype)

        def after_two(w: Tensor) -> Tensor:
            first, _ = step(state._replace(params={"w": w}), x)
            assert {each.dtype for each in flatten(first)[0]} == {dtype, torch.int64}
            return step(first, x)[0].params["w"].sum()

        assert torch.func.grad(after_two)(state.params["w"]).dtype == dtype

    simulate(program, plan.mesh)
