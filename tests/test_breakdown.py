"""`make profile`: every microsecond of a step is in one category, and in the right one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from breakdown import (
    BACKWARD,
    CATEGORIES,
    CLIPPING,
    GEMM,
    MODEL,
    OPTIMIZER,
    PERMUTATION,
    PYTHON,
    REST,
    STEP,
    Event,
    Transfers,
    breakdown,
    events_of,
    table,
)
from peers.shapes import SHAPES, Job
from profile_step import trainer
from torch.profiler import ProfilerActivity, profile, record_function

from sharding import Comm, Mesh, simulate

EXPERTS = "experts, elementwise"
FORWARD = (STEP, MODEL)
AGAIN = (STEP, f"{BACKWARD}_ClosedBackward")  # where a block is recomputed
EVENTS = {
    Event("aten::mm", 1.0, (*FORWARD, EXPERTS), (1,)): GEMM,
    Event("aten::argsort", 1.0, (*FORWARD, EXPERTS), (2,)): PERMUTATION,
    Event("aten::mul", 1.0, (*FORWARD, EXPERTS), (3,)): EXPERTS,
    Event("aten::mm", 1.0, (*FORWARD, "attention"), (4,)): "attention",
    Event("aten::softmax", 1.0, (*FORWARD, "routing"), (5,)): "routing",
    Event("aten::embedding", 1.0, FORWARD, (6,)): REST,
    Event("aten::cat", 1.0, (*FORWARD, EXPERTS, "all-to-all"), (7,)): "all-to-all",
    Event("aten::mm", 1.0, (STEP, f"{BACKWARD}MmBackward0"), (4,)): "attention",
    Event("aten::mm", 1.0, (STEP, f"{BACKWARD}_GroupedMmBackward"), (1, 99)): GEMM,
    Event("aten::mm", 1.0, (STEP, f"{BACKWARD}MmBackward0"), (98,)): REST,
    Event("aten::add", 1.0, (STEP, f"{BACKWARD}_WaitBackward", "reduce"), (4,)): "reduce",
    Event("aten::mm", 1.0, (*AGAIN, EXPERTS), (60, 61)): GEMM,
    Event("aten::mm", 1.0, (*AGAIN, f"{BACKWARD}MmBackward0"), (60, 61)): GEMM,
    Event("aten::mul", 1.0, (STEP,), ()): CLIPPING,
    Event("aten::mul", 1.0, (STEP, OPTIMIZER), ()): OPTIMIZER,
    Event("reduce", 1.0, (STEP,), ()): "reduce",
    Event(EXPERTS, 1.0, FORWARD, ()): PYTHON,
    Event(STEP, 1.0, (), ()): PYTHON,
}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: f"{event.name}-{EVENTS[event]}")
def test_an_event_belongs_to_what_ran_it_or_to_what_it_is_the_derivative_of(event: Event) -> None:
    once, twice = breakdown(EVENTS), breakdown([*EVENTS, event])
    assert {n: twice[n] - once[n] for n in twice if twice[n] > once[n]} == {EVENTS[event]: 1.0}


def test_what_is_outside_of_steps_is_not_counted() -> None:
    assert breakdown([Event("aten::mm", 1.0, (), ())]) == {}


def profiled(comm: Comm) -> tuple[dict[str, float], float]:
    """Microseconds by category, and those of the steps altogether."""
    run = trainer(Job(SHAPES["tiny"], length=16, ranks=1), Transfers(comm), "keep")
    run(0)
    with (
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen,
        record_function(STEP),
    ):
        run(1)
    events: Any = seen.events()
    (step,) = (event for event in events if event.name == STEP)
    return breakdown(events_of(seen)), step.cpu_time_total


def test_the_categories_of_a_real_step_add_up_to_it() -> None:
    ((times, whole),) = simulate(profiled, Mesh(edp=1, ep=1))
    assert sum(times.values()) == pytest.approx(whole, rel=1e-6)
    local = {PERMUTATION, GEMM, EXPERTS, "attention", "routing", REST, CLIPPING, OPTIMIZER, PYTHON}
    assert {name for name, time in times.items() if time > 0} == local
    assert local <= set(CATEGORIES)


def test_the_table_adds_up() -> None:
    rows = {line[:30].strip(): line for line in table([{GEMM: 3e3}, {PYTHON: 1e3}]).splitlines()}
    assert rows[GEMM].split()[-5:] == ["3.0", "ms", "0.0", "ms", "75.0%"]
    assert rows["together"].split()[1:] == ["3.0", "ms", "1.0", "ms", "100.0%"]


def test_transfers_leave_results_as_they_are() -> None:
    def program(comm: Comm) -> list[float]:
        (x,) = Transfers(comm).all_reduce([torch.tensor([1.0 + comm.rank])], ("ep",))
        return x.tolist()

    assert simulate(program, Mesh(ep=2)) == [[3.0], [3.0]]
