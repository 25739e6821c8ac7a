"""Simulated ranks: divergence is an error with a table, everything else is deterministic."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from budget import one_in
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharding import Comm, Divergence, Mesh, make_plan, sharded, simulate, zero3
from sharding.collectives import all_gather, all_to_all, psum, reduce_scatter
from sharding.comm import Op
from sharding.testing import meshes

MESH = Mesh(edp=2, ep=2)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


# -- divergence ----------------------------------------------------------------------------------


def skips(comm: Comm) -> None:
    if comm.rank != 3:
        comm.all_reduce([ones(2)], ("ep",))


def takes_another_operation(comm: Comm) -> None:
    kind = comm.all_gather if comm.rank == 3 else comm.all_reduce
    kind([ones(2)], ("ep",))


def names_other_axes(comm: Comm) -> None:
    comm.all_reduce([ones(2)], ("ep", "edp") if comm.rank == 3 else ("edp", "ep"))


def sends_another_shape(comm: Comm) -> None:
    comm.all_reduce([ones(3 if comm.rank == 3 else 2)], ("edp", "ep"))


def sends_another_dtype(comm: Comm) -> None:
    dtype = torch.float64 if comm.rank == 3 else torch.float32
    comm.all_gather([ones(2, dtype=dtype)], ("ep",))


def gathers_another_block(comm: Comm) -> None:
    """Three blocks alike, of which a rank gives up the first, and begins anew."""
    params = [{"w": ones(4)} for _ in range(3)]
    plan = make_plan(params, [{"w": "dense"}] * 3, {"dense": zero3("edp", "ep")}, comm.mesh)
    fails = comm.rank == 3

    def block(view: dict[str, Tensor], x: Tensor) -> Tensor:
        nonlocal fails
        if fails:
            fails = False
            raise ZeroDivisionError
        return x * view["w"].sum()

    run = sharded([block] * 3, plan, comm)
    with suppress(ZeroDivisionError):
        run(plan.shard(params, comm), ones())
    run(plan.shard(params, comm), ones())


def sends_another_number(comm: Comm) -> None:
    comm.all_gather([ones(2)] * (2 if comm.rank == 3 else 1), ("ep",))


def expects_other_rows(comm: Comm) -> None:
    receive = [1, 1, 2, 1] if comm.rank == 3 else [1, 1, 1, 1]
    comm.all_to_all([ones(4)], ("edp", "ep"), [1, 1, 1, 1], receive)


def sends_other_rows(comm: Comm) -> None:
    send = [1, 1, 2, 1] if comm.rank == 3 else [1, 1, 1, 1]
    comm.all_to_all([ones(sum(send))], ("edp", "ep"), send, [1, 1, 1, 1])


def waits_in_another_order(comm: Comm) -> None:
    axes = (("ep",), ("edp",)) if comm.rank in (0, 3) else (("edp",), ("ep",))
    for each in axes:
        comm.all_reduce([ones(2)], each)


def starts_and_does_not_wait(comm: Comm) -> None:
    if comm.rank == 3:
        comm.start(Op("all_reduce", ("ep",)), [ones(2)])


def skips_in_the_backward_pass(comm: Comm) -> None:
    x = ones(2).requires_grad_()
    y = all_gather(x, ("ep",), comm).sum()
    if comm.rank != 3:
        y.backward()


DIVERGING: list[tuple[Callable[[Comm], None], list[str]]] = [
    (skips, ["not started by all", "rank 3 {'edp': 1, 'ep': 1}: has returned"]),
    (
        takes_another_operation,
        ["Ranks 2 and 3 started different collectives", "at all_gather"],
    ),
    (names_other_axes, ["not started by all", "axes=('edp', 'ep')", "axes=('ep', 'edp')"]),
    (sends_another_shape, ["sent tensors of different shapes", "float32[2]", "float32[3]"]),
    (sends_another_dtype, ["different number or dtype", "float32[2]", "float64[2]"]),
    (sends_another_number, ["different number or dtype", "[float32[2], float32[2]]"]),
    (gathers_another_block, ["Rank 3 is at '0/w' and rank 2 at '2/w'", "of='2/w'", "of='0/w'"]),
    (expects_other_rows, ["What rank 2 sends to rank 3 is not what rank 3 expects"]),
    (sends_other_rows, ["What rank 2 sends to rank 3 is not what rank 3 expects"]),
    (waits_in_another_order, ["not started by all", "axes=('edp',)", "axes=('ep',)"]),
    (starts_and_does_not_wait, ["Ranks [3] started all_reduce(axes=('ep',))", "ranks [2] did not"]),
    (skips_in_the_backward_pass, ["not started by all", "rank 3", "has returned"]),
]


@pytest.mark.parametrize(("program", "expected"), DIVERGING)
def test_ranks_that_part_ways_are_an_error_with_a_table(
    program: Callable[[Comm], None], expected: list[str]
) -> None:
    threads = threading.active_count()
    with pytest.raises(Divergence) as caught:
        simulate(program, MESH)
    message = str(caught.value)
    missing = [text for text in expected if text not in message]
    assert not missing, f"{missing} not in:\n{message}"
    assert all(f"rank {rank} {MESH.coords(rank)}: " in message for rank in MESH)
    assert "put no collective behind a condition on local data" in message
    assert threading.active_count() == threads


def test_the_table_shows_the_lines_of_the_program() -> None:
    with pytest.raises(Divergence, match=r"in takes_another_operation \(test_simulate.py:\d+\)"):
        simulate(takes_another_operation, MESH)


def test_the_table_names_the_step_of_each_rank() -> None:
    def program(comm: Comm) -> None:
        for step in range(3 + comm.rank // 3):
            comm.at(step)
        skips(comm)

    with pytest.raises(Divergence) as caught:
        simulate(program, MESH)
    message = str(caught.value)
    assert message.count("in step 2, at all_reduce") == 1 and "in step 3" not in message
    with pytest.raises(Divergence, match="in step 3, at all_gather"):
        simulate(lambda comm: (comm.at(comm.rank), takes_another_operation(comm)), MESH)


def test_an_error_names_its_rank() -> None:
    def program(comm: Comm) -> None:
        comm.all_reduce([ones(1)], ("edp", "ep"))
        if comm.rank == 2:
            raise KeyError("lost")
        comm.all_reduce([ones(1)], ("edp", "ep"))

    threads = threading.active_count()
    with pytest.raises(KeyError, match="lost") as caught:
        simulate(program, MESH)
    note = "raised on simulated rank 2 of Mesh(edp=2, ep=2), at {'edp': 1, 'ep': 0}"
    assert caught.value.__notes__ == [note]
    assert threading.active_count() == threads


# -- determinism ---------------------------------------------------------------------------------


def draws(comm: Comm, rounds: int, order: list[int]) -> list[Tensor]:
    """Random numbers between collectives; ``order`` is that in which ranks come to run."""
    drawn = [torch.rand(2)]
    for _ in range(rounds):
        order.append(comm.rank)
        comm.all_reduce([drawn[-1]], comm.mesh.axes)
        drawn.append(torch.rand(2))
    return drawn


@one_in(2)
@given(mesh=meshes(), rounds=st.integers(0, 3))
def test_each_rank_has_a_stream_that_starts_at_the_callers(mesh: Mesh, rounds: int) -> None:
    torch.manual_seed(0)
    before, orders = torch.get_rng_state(), ([], [])
    for order in orders:
        found = simulate(draws, mesh, [rounds] * mesh.size, [order] * mesh.size)
        assert torch.equal(torch.get_rng_state(), before), "the caller's stream was moved"
        expected = [torch.rand(2) for _ in range(rounds + 1)]
        assert all(
            torch.equal(a, b) for drawn in found for a, b in zip(drawn, expected, strict=True)
        )
        torch.set_rng_state(before)
    assert orders[0] == orders[1], "ranks took turns in another order"


def test_ranks_can_seed_themselves_apart() -> None:
    def program(comm: Comm) -> Tensor:
        torch.manual_seed(comm.rank)
        psum(ones(1), ("edp", "ep"), comm)
        return torch.rand(1)

    expected = [torch.rand(1, generator=torch.Generator().manual_seed(rank)) for rank in MESH]
    assert torch.equal(torch.stack(simulate(program, MESH)), torch.stack(expected))


# -- transforms ----------------------------------------------------------------------------------


def powers(comm: Comm) -> Tensor:
    """Tangents on ranks that enter and leave jvp at different times."""

    def f(x: Tensor) -> Tensor:
        return all_gather(x ** (2 + comm.rank), ("ep",), comm)

    x, u = torch.tensor([2.0]), ones(1)
    first = torch.func.jvp(f, (x,), (u,))[1]
    return first + torch.func.jvp(lambda x: psum(f(x), ("ep",), comm), (x,), (u,))[1]


def test_tangents_survive_when_another_rank_leaves_its_jvp() -> None:
    expected = 3 * torch.tensor([2 * 2.0, 3 * 2.0**2])
    assert all(torch.equal(found, expected) for found in simulate(powers, Mesh(ep=2)))


@pytest.mark.parametrize(
    "transform",
    [torch.func.grad, torch.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))],
)
def test_a_simulation_inside_a_transform_is_refused(transform: Any) -> None:
    def f(x: Tensor) -> Tensor:
        return simulate(lambda comm: x * x, Mesh(ep=2))[0]

    x = ones() if transform is torch.func.grad else ones(2)
    with pytest.raises(RuntimeError, match=r"inside a torch\.func transform.* inside the program"):
        transform(f)(x)


def test_a_backward_pass_outside_is_refused() -> None:
    x = ones(2).requires_grad_()
    y = simulate(lambda comm: all_gather(x, ("ep",), comm).sum(), Mesh(ep=2))[0]
    with pytest.raises(RuntimeError, match="run the backward pass inside the program"):
        y.backward()


@pytest.mark.parametrize("grad", [False, True])
def test_gradients_are_enabled_inside_as_they_are_outside(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        assert simulate(lambda comm: torch.is_grad_enabled(), Mesh(ep=2)) == [grad] * 2


# -- arguments -----------------------------------------------------------------------------------


def test_arguments_and_results_go_by_rank() -> None:
    found = simulate(lambda comm, a, b: (comm.rank, a, int(b)), MESH, "wxyz", torch.arange(4))
    assert found == [(0, "w", 0), (1, "x", 1), (2, "y", 2), (3, "z", 3)]


def test_a_wrong_number_of_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match=r"per_rank\[1\] has 3 values for the 4 ranks of Mesh"):
        simulate(lambda comm, a, b: None, MESH, range(4), range(3))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda comm: all_gather(ones(), ("ep",), comm), "a scalar has no dim 0 to gather along"),
        (lambda comm: reduce_scatter(ones(3), ("ep",), comm), r"\(3,\) does not divide into 2"),
        (lambda comm: reduce_scatter(ones(), ("ep",), comm), "does not divide into 2 ranks"),
        (lambda comm: all_to_all(ones(2), ("ep",), comm, [2], [2]), "one split per rank"),
        (lambda comm: all_to_all(ones(2), ("ep",), comm, [1, 2], [2, 1]), r"sum\(send\) = 3 rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(act: Callable[[Comm], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(act, MESH)


# -- signals -------------------------------------------------------------------------------------


def test_a_signal_that_another_thread_gets_is_heard() -> None:
    """The main thread waits for the ranks, and only it can run a handler."""
    heard = threading.Event()

    def program(comm: Comm) -> bool:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        os.kill(os.getpid(), signal.SIGUSR1)
        return heard.wait(20)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.set())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        assert simulate(program, Mesh()) == [True]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, before)
