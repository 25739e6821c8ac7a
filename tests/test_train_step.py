"""The train step: its errors, metrics, donation and purity, and all of it under transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from farm import Farm
from laws import uneven
from torch import Tensor

from functional_ep import State, adamw, cosine, init_state, linear, make_train_step, sgd
from functional_ep.testing import prepare
from sharding import Comm, Divergence, Mesh, Plan, make_plan, replicated, sharded, simulate, zero3
from sharding.tree import flatten

MESH = Mesh(edp=2)
PARAMS = {"w": torch.tensor([1.0, -2.0, 3.0])}


def a_plan(mesh: Mesh = MESH) -> Plan:
    return make_plan(PARAMS, {"w": "dense"}, {"dense": zero3("edp")}, mesh)


def squares(view: dict[str, Tensor], x: Tensor) -> tuple[Tensor, int]:
    return ((view["w"] * x) ** 2).sum(), x.numel()


def one_step(loss: Callable[..., Any], batch: Any = None, **options: Any) -> Any:
    """Run one step of a loss of views on two ranks and return rank 0's result."""

    def program(comm: Comm) -> Any:
        plan = a_plan()
        step = make_train_step(sharded(loss, plan, comm), plan, sgd(0.1), comm, **options)
        state = init_state(plan.shard(PARAMS, comm), plan, sgd(0.1))
        return step(state, torch.ones(3) if batch is None else batch)

    return simulate(program, MESH)[0]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda view, x: (view["w"] * x).mean(), r"returned a single tensor.*reduction='sum'"),
        (lambda view, x: [view["w"].sum(), 1], r"returned a list"),
        (lambda view, x: (view["w"] * x, 1), r"sum is a tensor \(3,\)"),
        (lambda view, x: (1.0, 1), r"sum is 1.0"),
        (lambda view, x: (view["w"].sum(), 1.5), r"count is 1.5"),
        (lambda view, x: (view["w"].sum(), view["w"].sum()), r"count depends on the parameters"),
        (lambda view, x: (view["w"].sum(), 1, [x]), r"aux is \[tensor"),
        (lambda view, x: (x.sum(), 1), r"does not depend on the shards"),
    ],
)
def test_a_loss_that_is_no_sum_and_count_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_step(loss)


def with_aux_of_its_own(comm: Comm) -> None:
    plan, tx = a_plan(), sgd(0.1)

    def loss(view: dict[str, Tensor], x: Tensor) -> Any:
        return *squares(view, x), {"ab"[comm.rank]: x.sum()}

    step = make_train_step(sharded(loss, plan, comm), plan, tx, comm)
    step(init_state(plan.shard(PARAMS, comm), plan, tx), torch.ones(3))


def test_aux_of_other_names_is_not_added_up(ranks2: Farm) -> None:
    for run in (simulate, ranks2.run):
        with pytest.raises(Divergence, match=r"of='loss, count, a'(.|\n)*of='loss, count, b'"):
            run(with_aux_of_its_own, MESH)


IDS = torch.ones(2, dtype=torch.int64)


def steps(comm: Comm, *batches: Any) -> State:
    """A step on each batch; a batch is a tuple of microbatches."""
    plan = a_plan()
    loss = sharded(lambda view, batch: (view["w"].sum(), 1), plan, comm)
    step = make_train_step(loss, plan, sgd(0.1), comm)
    state = init_state(plan.shard(PARAMS, comm), plan, sgd(0.1))
    for batch in batches:
        state, _ = step(state, *batch)
    return state


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (({"x": IDS, "mask": IDS},), r"only rank 1 has \[\"batch\[0\]\['mask'\]"),
        (({"x": IDS.float()},), r"int64 with 1 dims.*float32 with 1 dims"),
        (({"x": IDS[None]},), r"1 dims.*2 dims"),
        (({"x": IDS}, {"x": IDS}), r"only rank 1 has \[\"batch\[1\]\['x'\]"),
    ],
)
def test_ranks_with_batches_of_different_structure_are_refused(
    other: Any, difference: str, ranks2: Farm
) -> None:
    good = ({"x": IDS},)
    for earlier in ((), (good,), (good, other)):  # whatever all ranks have agreed on before
        for run in (simulate, ranks2.run):
            each = [[batch] * 2 for batch in earlier]
            with pytest.raises(ValueError, match=difference):
                run(steps, MESH, *each, [good, other])


def test_bad_arguments_are_refused() -> None:
    def with_clip(comm: Comm) -> None:
        make_train_step(squares, a_plan(), sgd(0.1), comm, clip=0.0)

    with pytest.raises(ValueError, match=r"clip=0\.0: the largest norm is positive"):
        simulate(with_clip, MESH)
    with pytest.raises(
        ValueError, match=r"given for \['expert'\], but the labels to train are \['dense'\]"
    ):
        init_state(PARAMS, a_plan(Mesh(edp=1)), {"expert": sgd(0.1)})
    torch_s: Any = torch.optim.Adam
    with pytest.raises(TypeError, match=r"optimizers are .*Adam.*a dict of them by label"):
        init_state(PARAMS, a_plan(Mesh(edp=1)), torch_s)
    with pytest.raises(TypeError, match=r"\['dense'\] is .*Adam.*: an Optimizer is needed"):
        init_state(PARAMS, a_plan(Mesh(edp=1)), {"dense": torch_s})
    short: Any = sgd(0.1)._replace(update=lambda step, params, grads, moments, donate: (params, {}))
    with pytest.raises(TypeError, match=r"the optimizer: update is called as .* too many"):
        init_state(PARAMS, a_plan(Mesh(edp=1)), short)
    with pytest.raises(ValueError, match="plan was made for Mesh"):
        simulate(lambda comm: make_train_step(squares, a_plan(), sgd(0.1), comm), Mesh(edp=1))
    with pytest.raises(ValueError, match="nesterov=True needs a momentum"):
        sgd(0.1, nesterov=True)


def test_a_step_needs_a_state_and_a_batch() -> None:
    def program(comm: Comm) -> None:
        plan = a_plan()
        step = make_train_step(sharded(squares, plan, comm), plan, sgd(0.1), comm)
        state = init_state(plan.shard(PARAMS, comm), plan, sgd(0.1))
        with pytest.raises(ValueError, match="no batch; a rank without tokens"):
            step(state)
        with pytest.raises(ValueError, match="a State expected, found dict"):
            step(PARAMS, torch.ones(3))
        with pytest.raises(ValueError, match=r"missing shards\['w'\]"):
            step(State(state.step, {}, state.opt), torch.ones(3))
        with pytest.raises(ValueError, match=r"shards\['w'\]: a shard \(2,\) of \(3,\) expected"):
            step(State(state.step, PARAMS, state.opt), torch.ones(3))

    simulate(program, MESH)


def test_metrics_are_global_and_named() -> None:
    _, metrics = one_step(lambda view, x: (*squares(view, x), {"seen": torch.tensor(7)}))
    assert {name: float(x) for name, x in metrics.items() if name != "grad_norm"} == {
        "loss": pytest.approx(14 / 3),
        "count": 6.0,
        "lr": pytest.approx(0.1),
        "seen": 14.0,
    }
    assert float(metrics["grad_norm"]) == pytest.approx(2 * 14**0.5 / 3)


def test_aux_is_summed_by_name_and_keeps_to_names_of_its_own() -> None:
    def program(comm: Comm, names: list[str]) -> dict[str, Tensor]:
        plan = a_plan()
        values = {"a": torch.tensor(1), "b": torch.tensor(10), "loss": torch.tensor(7)}

        def loss(view: dict[str, Tensor], x: Tensor) -> tuple[Any, ...]:
            return (*squares(view, x), {name: values[name] for name in names})

        step = make_train_step(sharded(loss, plan, comm), plan, sgd(0.1), comm)
        return step(init_state(plan.shard(PARAMS, comm), plan, sgd(0.1)), torch.ones(3))[1]

    metrics = simulate(program, MESH, [["a", "b"], ["b", "a"]])[0]
    assert (int(metrics["a"]), int(metrics["b"])) == (2, 20)
    with pytest.raises(ValueError, match="aux has 'loss', which is a metric of the step"):
        simulate(program, MESH, [["loss"], ["loss"]])


def test_a_step_without_any_token_changes_nothing() -> None:
    state, metrics = one_step(squares, torch.ones(0, 3))
    assert torch.equal(state.params["w"], PARAMS["w"][:2])
    assert (float(metrics["loss"]), int(metrics["count"])) == (0.0, 0)


@pytest.mark.parametrize(
    "optimizer", [adamw(cosine(0.1, total=9)), sgd(linear(0.1, total=9), 0.9, nesterov=True)]
)
def test_donating_gives_the_same_bits_in_the_same_memory(optimizer: Any) -> None:
    def program(comm: Comm, donate: bool) -> tuple[Any, list[int], list[int], dict[str, Tensor]]:
        plan = a_plan()
        loss = sharded(squares, plan, comm)
        step = make_train_step(loss, plan, optimizer, comm, clip=0.1, donate=donate)
        state = init_state(plan.shard(PARAMS, comm), plan, optimizer)
        before = [x.data_ptr() for x in flatten((state.params, state.opt))[0]]
        metrics: dict[str, Tensor] = {}
        for _ in range(3):
            state, metrics = step(state, torch.ones(3))
        after = [x.data_ptr() for x in flatten((state.params, state.opt))[0]]
        return plan.full(state.params, comm)["w"], before, after, metrics

    kept = simulate(program, MESH, [False] * 2)[0]
    donated = simulate(program, MESH, [True] * 2)[0]
    assert torch.equal(kept[0], donated[0])
    for name, x in kept[3].items():
        assert torch.equal(donated[3][name], x), name
    assert donated[1] == donated[2]
    assert kept[1] != kept[2]


def test_a_donated_state_that_is_used_again_is_refused() -> None:
    def program(comm: Comm) -> None:
        plan = a_plan()
        step = make_train_step(sharded(squares, plan, comm), plan, sgd(0.1), comm, donate=True)
        old = init_state(plan.shard(PARAMS, comm), plan, sgd(0.1))
        new, _ = step(old, torch.ones(3))
        with pytest.raises(ValueError, match="donated to an earlier step"):
            step(old, torch.ones(3))
        with pytest.raises(ValueError, match="a shard"):
            plan.full(old.params, comm)
        step(new, torch.ones(3))

    simulate(program, MESH)


def test_the_step_is_pure() -> None:
    """Inputs stay as they are, and the same inputs give the same bits."""
    case = uneven(clip=0.05)

    def program(comm: Comm) -> None:
        _, state, step = prepare(comm, case)
        batch = case.batch(0, 0, comm.rank)
        before = [x.clone() for x in flatten((state, batch))[0]]
        one, two = step(state, batch), step(state, batch)
        for x, y in zip(flatten((state, batch))[0], before, strict=True):
            assert torch.equal(x, y)
        for x, y in zip(flatten(one)[0], flatten(two)[0], strict=True):
            assert torch.equal(x, y)

    simulate(program, case.mesh)


def test_gradients_that_share_memory_are_not_scaled_twice() -> None:
    """A loss that adds two leaves has one cotangent for both; donation scales in place."""
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    labels = {"a": "dense", "b": "dense"}

    def program(comm: Comm, donate: bool) -> dict[str, Tensor]:
        plan = make_plan(params, labels, {"dense": replicated()}, comm.mesh)
        loss = sharded(lambda view, x: ((view["a"] + view["b"]) @ x, 2), plan, comm)
        step = make_train_step(loss, plan, sgd(1.0), comm, donate=donate)
        state = init_state(plan.shard(params, comm), plan, sgd(1.0))
        return step(state, torch.tensor([2.0, 4.0]))[0].params

    for donate in (False, True):
        (after,) = simulate(program, Mesh(edp=1), [donate])
        for name in params:
            assert torch.equal(after[name], torch.tensor([0.0, -1.0])), (name, donate)


def test_transforms_wrap_the_whole_step() -> None:
    """The derivative of the loss after a step with respect to the weights before it."""

    def program(comm: Comm) -> tuple[Tensor, Tensor]:
        plan = a_plan()
        loss = sharded(squares, plan, comm)
        step = make_train_step(loss, plan, sgd(0.1), comm)
        state = init_state(plan.shard(PARAMS, comm), plan, sgd(0.1))
        x = torch.ones(3)

        def after(shards: Any) -> Tensor:
            return loss(step(State(state.step, shards, state.opt), x)[0].params, x)[0]

        found = plan.full(torch.func.grad(after)(state.params), comm)["w"]

        # one process: two ranks with the same x: mean of squares, step, sum over both ranks
        def plain(w: Tensor) -> Tensor:
            g = torch.func.grad(lambda w: (w**2).sum() / 3)(w)
            return 2 * ((w - 0.1 * g) ** 2).sum()

        return found, torch.func.grad(plain)(PARAMS["w"])

    for found, expected in simulate(program, MESH):
        torch.testing.assert_close(found, expected)


def test_donation_is_refused_under_a_transform() -> None:
    def program(comm: Comm) -> None:
        plan = a_plan()
        step = make_train_step(sharded(squares, plan, comm), plan, sgd(0.1), comm, donate=True)
        state = init_state(plan.shard(PARAMS, comm), plan, sgd(0.1))
        with pytest.raises(ValueError, match="donate=True under a transform"):
            torch.func.grad(lambda x: step(state, x)[1]["loss"])(torch.ones(3))

    simulate(program, MESH)


def test_a_state_of_other_optimizers_is_refused() -> None:
    params = {"w": torch.ones(2)}
    plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=1))

    def program(comm: Comm) -> None:
        loss = sharded(lambda view, x: ((view["w"] * x).sum(), 1), plan, comm)
        step = make_train_step(loss, plan, adamw(0.1), comm)
        step(init_state(plan.shard(params, comm), plan, sgd(0.1)), torch.ones(2))

    found = (
        r"has the moments \{'dense': \[\]\}, and these optimizers have \{'dense': \['m', 'v'\]\}"
    )
    with pytest.raises(ValueError, match=found):
        simulate(program, plan.mesh)
