"""T7: equal gradients give equal updates under every label at every step, resumed or not."""

from __future__ import annotations

import io

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep import init_state, make_train_step
from functional_ep.state import State
from functional_ep.testing import Chosen, Training, chosen, prepare, trainings
from sharding import Comm, Mesh, expert_parallel, make_plan, sharded, simulate, zero3
from sharding.tree import flatten


@given(chosen(), st.integers(1, 10), st.sampled_from([None, 0.05]), st.integers(0, 2**20))
def test_labels_share_one_clock(choice: Chosen, steps: int, clip: float | None, seed: int) -> None:
    mesh = Mesh(edp=2, ep=2)
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    params = {"a": start, "b": start.clone()}
    rules = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
    plan = make_plan(params, {"a": "dense", "b": "expert"}, rules, mesh)
    optimizers = {"dense": choice.make(), "expert": choice.make()}

    def loss(view: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, int]:
        # A rank's view of b is half of it, held by two ranks: together they add up to a's gradient.
        return (view["a"].sin().sum() + 2 * view["b"].sin().sum()) * weight, 1

    def program(comm: Comm) -> list[tuple[Tensor, Tensor]]:
        step = make_train_step(sharded(loss, plan, comm), plan, optimizers, comm, clip=clip)
        state, seen = init_state(plan.shard(params, comm), plan, optimizers), []
        for i in range(steps):
            state, metrics = step(state, torch.tensor(1.0 + i).double())
            assert torch.equal(metrics["lr/dense"], metrics["lr/expert"])
            whole = plan.full(state.params, comm)
            seen.append((whole["a"], whole["b"]))
        return seen

    for step, (a, b) in enumerate(simulate(program, mesh)[0]):
        assert torch.equal(a, b), f"labels part at step {step} under {choice}"


@given(trainings(max_ranks=4), st.integers(0, 3))
def test_resuming_is_never_having_stopped(case: Training, stop: int) -> None:
    """A state that went through bytes and into a new step function goes on to the same bits."""

    def program(comm: Comm, resumes: bool) -> State:
        _, state, step = prepare(comm, case)
        for i, micros in enumerate(case.batches(comm.rank)):
            if resumes and i == stop:
                state, (_, _, step) = through_bytes(state), prepare(comm, case)
            state, _ = step(state, *micros)
        return state

    ranks = case.mesh.size
    resumed = simulate(program, case.mesh, [True] * ranks)
    for one, other in zip(resumed, simulate(program, case.mesh, [False] * ranks), strict=True):
        for x, y in zip(flatten(one)[0], flatten(other)[0], strict=True):
            assert torch.equal(x, y)


def through_bytes(state: State) -> State:
    buffer = io.BytesIO()
    torch.save(tuple(state), buffer)
    buffer.seek(0)
    return State(*torch.load(buffer))
