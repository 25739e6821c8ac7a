"""T9: when transfers start and end, how often blocks are computed, and what they may capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from functional_ep import init_state, make_train_step, sgd
from sharding import Comm, Mesh, Plan, make_plan, sharded, simulate, zero3
from sharding.comm import Op, Then, Work
from sharding.node import Node
from sharding.sharded import Backward
from sharding.testing import Recording

MESH = Mesh(ep=2)
MODES: tuple[Backward, ...] = get_args(Backward)

FORWARD = """
start gather 0, wait gather 0
start gather 1, block 0, wait gather 1
start gather 2, block 1, wait gather 2
block 2
"""
BACKWARD = {
    "keep": """
begin 2, end 2, start reduce 2
begin 1, end 1, wait reduce 2, start reduce 1
begin 0, end 0, wait reduce 1, start reduce 0
wait reduce 0
""",
    "regather": """
begin 2, start gather 1, end 2, start reduce 2
begin 1, wait gather 1, start gather 0, end 1, wait reduce 2, start reduce 1
begin 0, wait gather 0, end 0, wait reduce 1, start reduce 0
wait reduce 0
""",
    "recompute": """
start gather 1, block 2, begin 2, end 2, start reduce 2
wait gather 1, start gather 0, block 1, begin 1, end 1, wait reduce 2, start reduce 1
wait gather 0, block 0, begin 0, end 0, wait reduce 1, start reduce 0
wait reduce 0
""",
}


class Traced(Recording):
    """Writes down, in one list, transfers by block and the beginning and end of each block."""

    def __init__(self, comm: Comm, plan: Plan) -> None:
        super().__init__(comm)
        self.block = {w.shard_size: i for i, w in enumerate(plan.layouts)}
        self.trace: list[str] = []

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        if op.kind == "all_gather":
            what = f"gather {self.block[len(xs[0])]}"
        else:
            what = f"reduce {self.block[len(xs[0]) // self.mesh.size]}"
        self.trace.append(f"start {what}")
        return Then(super()._start(op, xs), lambda ys: self.trace.append(f"wait {what}") or ys)


class _Mark(Node):
    """The identity, which writes down when the backward pass comes through."""

    @staticmethod
    def forward(x: Tensor, write: Callable[[str], None], what: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.write, ctx.what = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.write(ctx.what)
        return grads[0], None, None


def trace(comm: Comm, mode: Backward, transform: bool) -> tuple[list[str], list[str]]:
    """What happens in the forward and in the backward pass of three blocks of different sizes."""
    params = [torch.zeros(4, 2), torch.zeros(4, 4), torch.zeros(4, 6)]
    plan = make_plan(params, ["dense"] * 3, {"dense": zero3("ep")}, MESH)
    traced = Traced(comm, plan)

    def layer(i: int, view: Tensor, x: Tensor) -> Tensor:
        traced.trace.append(f"block {i}")
        x = _Mark.apply(x, traced.trace.append, f"end {i}")
        return _Mark.apply(torch.tanh(x @ view @ view.T), traced.trace.append, f"begin {i}")

    run = sharded([partial(layer, i) for i in range(3)], plan, traced, mode)
    shards, x = plan.shard(params, comm), torch.ones(1, 4)
    if transform:
        y, pull = torch.func.vjp(run, shards, x)[:2]
    else:
        leaves = [a.requires_grad_() for a in (*shards, x)]
        y = run(shards, x)
    forward, traced.trace[:] = list(traced.trace), []
    if transform:
        pull(torch.ones_like(y), retain_graph=False, create_graph=False)
    else:
        torch.autograd.grad(y.sum(), leaves)
    return forward, traced.trace


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gathers_run_ahead_of_the_blocks_and_reductions_finish_behind_them(
    mode: Backward, transform: bool
) -> None:
    expected = tuple(text.strip().replace("\n", ", ") for text in (FORWARD, BACKWARD[mode]))
    for passes in simulate(trace, MESH, [mode] * 2, [transform] * 2):
        assert tuple(map(", ".join, passes)) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transform", [False, True])
def test_after_an_error_nothing_is_left_in_flight(mode: Backward, transform: bool) -> None:
    """Which the caller of the step may catch, as where memory is short, to go on."""

    def program(comm: Comm) -> None:
        params = [torch.ones(4)] * 3
        plan = make_plan(params, ["dense"] * 3, {"dense": zero3("ep")}, MESH)

        def fails(view: Tensor, x: Tensor) -> Tensor:
            raise MemoryError

        run = sharded([lambda view, x: view * x, fails, fails], plan, comm, mode)
        call = torch.func.grad(lambda *xs: run(*xs).sum()) if transform else run
        with pytest.raises(MemoryError):
            call(plan.shard(params, comm), torch.ones(4))
        assert not comm.in_flight

    simulate(program, MESH)


# -- captured tensors ----------------------------------------------------------------------------


def gradient_of_captured(comm: Comm, mode: Backward, nested: bool) -> Tensor | None:
    """The gradient of a tensor that a block takes from elsewhere than its arguments."""
    params = torch.ones(2)
    plan = make_plan(params, "dense", {"dense": zero3("ep")}, MESH)
    scale = torch.ones(2, requires_grad=True)

    def multiply(x: Tensor) -> Tensor:
        return x * scale

    f: Any = (lambda view: multiply(view)) if nested else (lambda view: view * scale)
    sharded(f, plan, comm, mode)(plan.shard(params, comm)).sum().backward()
    return scale.grad


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_tensor_gets_its_gradient_or_is_refused(mode: Backward, nested: bool) -> None:
    arguments = [mode] * 2, [nested] * 2
    if mode != "recompute":
        for found in simulate(gradient_of_captured, MESH, *arguments):
            assert found is not None and torch.equal(found, torch.ones(2))
        return
    with pytest.raises(ValueError, match=r"captures the tensor 'scale' \(2,\).* would be lost"):
        simulate(gradient_of_captured, MESH, *arguments)


def test_a_tensor_captured_inside_a_transform_is_refused() -> None:
    def program(comm: Comm) -> None:
        plan = make_plan(torch.ones(2), "dense", {"dense": zero3("ep")}, MESH)
        shard = plan.shard(torch.ones(2), comm)

        def loss(scale: Tensor) -> Tensor:
            return sharded(lambda view: view * scale, plan, comm, "recompute")(shard).sum()

        torch.func.grad(loss)(torch.ones(2))

    with pytest.raises(ValueError, match="captures the tensor 'scale'"):
        simulate(program, MESH)


# -- what goes wrong inside of a block -------------------------------------------------------------


class _Fails(Node):
    """The identity, whose backward pass has no memory left."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise MemoryError


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_fails_in_its_backward_pass_leaves_nothing_in_flight(mode: Backward) -> None:
    params = [torch.ones(4)] * 3
    plan = make_plan(params, ["dense"] * 3, {"dense": zero3("ep")}, MESH)

    def first(view: Tensor, x: Tensor) -> Tensor:
        return _Fails.apply(view) * x

    def last(view: Tensor, x: Tensor) -> tuple[Tensor, int]:
        return (view * x).sum(), 1

    def program(comm: Comm) -> None:
        loss = sharded([first, lambda view, x: view * x, last], plan, comm, mode)
        step = make_train_step(loss, plan, sgd(0.1), comm)
        state = init_state(plan.shard(params, comm), plan, sgd(0.1))
        for _ in range(2):
            with pytest.raises(MemoryError):
                step(state, torch.ones(4))
            assert not comm.in_flight

    simulate(program, MESH)


@pytest.mark.parametrize("mode", MODES)
def test_a_transform_inside_of_a_block_works_or_says_what_does(mode: Backward) -> None:
    def block(view: Tensor, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (view * x * x).sum())(x).sum()

    def program(comm: Comm) -> Tensor:
        plan = make_plan(torch.ones(4), "dense", {"dense": zero3("ep")}, MESH)
        shard = plan.shard(torch.ones(4), comm).requires_grad_()
        sharded(block, plan, comm, mode)(shard, torch.ones(4)).backward()
        return shard.grad

    if mode == "keep":
        assert torch.equal(simulate(program, MESH)[0], torch.full((2,), 4.0))
        return
    with pytest.raises(RuntimeError, match="saved tensor hooks") as raised:
        simulate(program, MESH)
    assert any("use backward='keep'" in note for note in raised.value.__notes__)
