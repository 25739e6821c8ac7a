"""T13: all ranks start and await the same collectives in the same order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import DERIVATIVES, EVERY, Model, loss, models
from budget import one_in
from hypothesis import given
from hypothesis import strategies as st

from sharding import Comm, Mesh, make_plan, sharded, simulate, zero3
from sharding.comm import Op
from sharding.recording import Event
from sharding.sharded import Backward
from sharding.testing import Recording, check_symmetry

MESH = Mesh(edp=2, ep=2)


def program(comm: Comm, model: Model, derivative: Any, how: tuple[str, Backward]) -> None:
    """A derivative on ranks of which some have no data."""
    plan = model.plan()
    shards, u = plan.shard(model.params(), comm), plan.shard(model.params(1), comm)
    derivative(loss(*how, plan, comm, model), shards, model.data(comm.rank), u)
    assert not comm.in_flight, "a transfer that a derivative started was never awaited"


@pytest.mark.parametrize("derivative", DERIVATIVES)
@one_in(4)
@given(data=st.data())
def test_no_rank_leaves_the_order_of_the_others(derivative: Any, data: st.DataObject) -> None:
    model, how = data.draw(models(smooth=True)), data.draw(st.sampled_from(EVERY))
    arguments = [[a] * model.mesh.size for a in (model, derivative, how)]
    events = check_symmetry(program, model.mesh, *arguments)
    starts = [event for event in events if event.what == "start"]
    assert 2 * len(starts) == len(events), "something was started and not awaited"


# -- planted -------------------------------------------------------------------------------------


def crosses(comm: Comm) -> None:
    """Along every fiber all is well: each pair of ranks has one collective."""
    axes = [("ep",), ("edp",)]
    if comm.rank in (1, 2):
        axes.reverse()
    for work in [comm.start(Op("all_reduce", each), [torch.ones(2)]) for each in axes]:
        work.wait()


def waits_the_other_way_round(comm: Comm) -> None:
    works = [comm.start(Op("all_reduce", ("ep",)), [torch.ones(n)]) for n in (1, 2)]
    for work in works if comm.rank else works[::-1]:
        work.wait()


def stops_early(comm: Comm) -> None:
    work = comm.start(Op("all_reduce", ("ep",)), [torch.ones(1)])
    if comm.rank:
        work.wait()


@pytest.mark.parametrize("program", [crosses, waits_the_other_way_round, stops_early])
def test_another_order_is_rejected_though_the_program_ends(program: Any) -> None:
    with pytest.raises(AssertionError, match=r"T13 symmetry: rank 0 and rank 1 of Mesh.* part at"):
        check_symmetry(program, MESH)


def test_rows_of_an_all_to_all_may_differ() -> None:
    def program(comm: Comm) -> None:
        rows = [[0, 3], [2, 1]]
        receive = [row[comm.rank] for row in rows]
        comm.all_to_all([torch.ones(sum(rows[comm.rank]))], ("ep",), rows[comm.rank], receive)

    events = check_symmetry(program, Mesh(ep=2))
    assert [event.what for event in events] == ["start", "wait"]


def test_a_recording_hears_other_arrangements_of_its_ranks() -> None:
    def program(comm: Comm) -> list[Event]:
        recording = Recording(comm)
        recording.on(Mesh(edp=2, ep=2)).all_reduce([torch.ones(2)], ("edp",))
        return recording.events

    assert [event.op.axes for event in simulate(program, Mesh(ep=4))[0]] == [("edp",)] * 2


def test_what_a_block_sends_is_named_by_its_first_leaf_in_both_directions() -> None:
    params = [{"a": torch.ones(2), "b": torch.ones(2)} for _ in range(2)]
    plan = make_plan(params, [{"a": "d", "b": "d"}] * 2, {"d": zero3("ep")}, Mesh(ep=2))

    def program(comm: Comm) -> list[tuple[str, str]]:
        recording = Recording(comm)
        run = sharded([lambda v, x: x * v["a"].sum() * v["b"].sum()] * 2, plan, recording, "keep")
        torch.func.grad(run)(plan.shard(params, comm), torch.ones(()))
        return [(e.op.kind, e.op.of) for e in recording.events if e.what == "start"]

    gathered, reduced = "all_gather", "reduce_scatter"
    expected = [(gathered, "0/a"), (gathered, "1/a"), (reduced, "1/a"), (reduced, "0/a")]
    assert simulate(program, plan.mesh) == [expected] * 2
