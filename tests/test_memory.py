"""Rehearsed memory is that of the real step, to the byte where nothing depends on the routing."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from functional_ep import Optimizer, adamw, init_state, lm, make_train_step
from functional_ep.memory import StepMemory, step_memory
from sharding import Comm, Mesh, Plan, expert_parallel, make_plan, simulate, zero3
from sharding.rehearsal import Memory, rehearse
from sharding.sharded import Backward

RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
CFG = lm.Config(vocab=64, dim=32, layers=3, heads=2, experts=4, top_k=2, ffn=32)
IDS = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}
TOLERANCE = 1e-6
CLOCK = 8  # bytes of state.step
MODES: tuple[Backward, ...] = get_args(Backward)


class Watching(TorchDispatchMode):
    """Adds up the memory of what is really computed."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        tree_map_only(Tensor, self.memory.seen, out)
        return out


def measured(comm: Comm, plan: Plan, backward: Backward) -> StepMemory:
    """What :func:`step_memory` foresees, of tensors that are computed."""
    memory, optimizer = Memory(), adamw(1e-3)
    shards = plan.shard(lm.init(CFG), comm)
    for shard in plan.flatten(shards):
        memory.seen(shard)
    with Watching(memory):
        before = memory.alive
        state = init_state(shards, plan, optimizer)
        moments = memory.alive - before
        del shards, shard
        loss = lm.loss(CFG, plan, comm, backward)
        step = make_train_step(loss, plan, optimizer, comm, clip=1.0, donate=True)
        memory.restart()
        for _ in range(2):
            state, _ = step(state, BATCH)
    return StepMemory(before, moments, memory.most - before - moments)


def foreseen(plan: Plan, backward: Backward) -> StepMemory:
    def loss(plan: Plan, comm: Comm) -> Any:
        return lm.loss(CFG, plan, comm, backward)

    return step_memory(loss, plan, adamw(1e-3), BATCH, clip=1.0)


@pytest.mark.parametrize("backward", MODES)
def test_what_is_foreseen_is_what_a_real_step_takes(backward: Backward) -> None:
    plan = make_plan(lm.init(CFG), lm.labels, RULES, Mesh(edp=1, ep=1))
    (real,) = simulate(measured, plan.mesh, [plan], [backward])
    found = foreseen(plan, backward)
    assert (found.params, found.moments) == (real.params, real.moments)
    assert found.step == pytest.approx(real.step, rel=TOLERANCE)
    # One rank has nothing to gather again, but activations to give up.
    other = foreseen(plan, "keep" if backward == "recompute" else "recompute").step
    assert other != pytest.approx(real.step, rel=TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_state_is_that_of_the_plan(ranks: int) -> None:
    plan = make_plan(lm.init(CFG), lm.labels, RULES, Mesh(edp=1, ep=ranks))
    found = foreseen(plan, "regather")
    stored = sum(w.shard_size * 4 for w in plan.layouts)
    assert (found.params, found.moments) == (stored, 2 * stored + CLOCK)
    assert found.step > stored  # the gradients, and more


def test_keeping_views_and_activations_takes_what_it_takes() -> None:
    plan = make_plan(
        lm.init(CFG), lm.labels, {**RULES, "expert": zero3("edp", "ep")}, Mesh(edp=4, ep=1)
    )
    keep, regather, recompute = (foreseen(plan, mode).step for mode in MODES)
    assert keep > regather > recompute


def test_an_undonated_step_holds_two_states() -> None:
    plan = make_plan(lm.init(CFG), lm.labels, RULES, Mesh(edp=1, ep=1))
    loss = lambda plan, comm: lm.loss(CFG, plan, comm)  # noqa: E731
    twice = step_memory(loss, plan, adamw(1e-3), BATCH, donate=False)
    once = step_memory(loss, plan, adamw(1e-3), BATCH)
    assert twice.step - once.step >= 0.8 * once.params


@pytest.mark.parametrize("kind", ["lm", "of one's own", "none at all", "a maker that fails"])
def test_a_loss_in_place_of_what_makes_it_is_refused(kind: str) -> None:
    plan = make_plan(lm.init(CFG), lm.labels, RULES, Mesh(edp=1, ep=1))
    (whole,) = simulate(lambda comm: lm.loss(CFG, plan, comm), plan.mesh)
    wrong: Any = "kept"
    losses: dict[str, Any] = {
        "lm": whole,
        "of one's own": lambda shards, batch: (torch.zeros(()), 1),
        "none at all": 3.0,
        "a maker that fails": lambda plan, comm: lm.loss(CFG, plan, comm, wrong),
    }
    message = r"pass what makes it, such as lambda plan, comm: .* of a plan and a comm (raises|is)"
    if kind == "a maker that fails":
        message += ".*'kept'"
    with pytest.raises(TypeError, match=message):
        step_memory(losses[kind], plan, adamw(1e-3), BATCH)


def test_optimizers_may_be_made_for_the_ranks_that_are_not_there() -> None:
    """One that gathers its gradients in each update, as Muon does, and so needs the comm."""
    plan = make_plan(lm.init(CFG), lm.labels, RULES, Mesh(edp=2, ep=2))
    plain = adamw(1e-3)

    def optimizers(plan: Plan, comm: Comm) -> dict[str, Optimizer]:
        def update(step: Any, params: Any, grads: Any, *rest: Any) -> Any:
            whole = comm.all_gather(grads, comm.mesh.axes)
            assert [len(x) for x in whole] == [4 * len(g) for g in grads]
            assert len(torch.cat(whole * 16)) * 4 > 2**20  # bytes
            return plain.update(step, params, grads, *rest)

        gathers: Any = update
        return {"dense": plain, "expert": Optimizer(plain.init, gathers, plain.rate)}

    def loss(plan: Plan, comm: Comm) -> Any:
        return lm.loss(CFG, plan, comm, "keep")

    gathering = step_memory(loss, plan, optimizers, BATCH)
    same = step_memory(loss, plan, lambda plan, comm: plain, BATCH)
    assert same == step_memory(loss, plan, plain, BATCH)
    assert gathering[:2] == same[:2] and gathering.step > same.step + 2**18
    with pytest.raises(TypeError, match=r"optimizers are 3"):
        step_memory(loss, plan, lambda plan, comm: 3, BATCH)  # pyright: ignore[reportArgumentType]


# -- rehearsal -----------------------------------------------------------------------------------


def test_nothing_is_touched_and_shapes_are_right() -> None:
    def program(comm: Comm, memory: Memory) -> list[Any]:
        huge = torch.zeros(2**34)  # 64 GiB
        view = huge.view(-1, 4)[1:]
        product = view[:3] @ torch.ones(4, 5)
        assert view.untyped_storage().data_ptr() == huge.untyped_storage().data_ptr()
        assert huge.add_(1) is not view and huge.mul_(2).data_ptr() == huge.data_ptr()
        return [tuple(product.shape), memory.alive >> 30]

    assert rehearse(program, Mesh()) == [(3, 5), 64]


def test_memory_that_is_let_go_counts_no_more() -> None:
    def program(comm: Comm, memory: Memory) -> tuple[int, int]:
        x = torch.empty(1000)
        for _ in range(3):
            x = x + 1
        return memory.alive, memory.most

    assert rehearse(program, Mesh()) == (4000, 8000)


def test_integers_are_computed_and_choices_spread_evenly() -> None:
    def program(comm: Comm, memory: Memory) -> tuple[list[int], list[int]]:
        chosen = torch.rand(6, 4).topk(2).indices
        counts = torch.bincount(chosen.flatten(), minlength=4)
        (arrived,) = comm.all_to_all([counts], ("ep",), [2, 2], [2, 2])
        (total,) = comm.all_reduce([torch.tensor([3])], ("ep",))
        return arrived.tolist(), total.tolist()

    assert rehearse(program, Mesh(ep=2)) == ([3, 3, 3, 3], [6])


@pytest.mark.parametrize(
    ("kind", "rows"), [("all_gather", 16), ("reduce_scatter", 1), ("all_reduce", 4)]
)
def test_what_arrives_has_the_shape_that_it_has_on_real_ranks(kind: str, rows: int) -> None:
    def program(comm: Comm, memory: Memory) -> tuple[int, ...]:
        (y,) = getattr(comm, kind)([torch.ones(4, 3)], ("ep",))
        return tuple(y.shape)

    assert rehearse(program, Mesh(edp=2, ep=4)) == (rows, 3)
