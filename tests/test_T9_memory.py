"""T9: block by block, no more than two blocks are whole at a time, forward and backward."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import Any, get_args

import pytest
import torch
from farm import Farm
from torch import Tensor

from functional_ep.compile import compiled
from sharding import Comm, Mesh, Plan, make_plan, sharded, simulate, zero3
from sharding.buffers import SMALL, Buffers
from sharding.comm import Op, Work
from sharding.sharded import Backward
from sharding.testing import Recording, exact_params

MESH = Mesh(ep=2)
MODES: tuple[Backward, ...] = get_args(Backward)
Block = dict[str, Tensor]


def plan_of(blocks: int, width: int) -> Plan:
    params = [{"w": torch.zeros(width, width)} for _ in range(blocks)]
    return make_plan(params, [{"w": "dense"}] * blocks, {"dense": zero3("ep")}, MESH)


def shards_of(plan: Plan, comm: Comm, requires_grad: bool = False) -> list[Block]:
    shards = plan.shard(exact_params(plan, 0), comm)
    return [{"w": shard["w"].requires_grad_(requires_grad)} for shard in shards]


class Watching(Recording):
    """Knows how many gathered views are alive or on their way, and the most there ever were."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm)
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.on_the_way = 0
        self.most = 0

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        work = super()._start(op, xs)
        if op.kind != "all_gather":
            return work
        self.on_the_way += 1
        self.look()
        return _Watched(self, work)

    def look(self) -> int:
        """A storage is alive while there are references to it that are not ours."""
        alive = [s for s in self.storages.values() if references(s) > 1]
        self.most = max(self.most, len(alive) + self.on_the_way)
        return len(alive) + self.on_the_way


class _Watched:
    def __init__(self, watching: Watching, work: Work) -> None:
        self.watching, self.work = watching, work

    def wait(self) -> list[Tensor]:
        ys = self.work.wait()
        self.watching.on_the_way -= 1
        self.watching.storages |= {y.untyped_storage()._cdata: y.untyped_storage() for y in ys}
        self.watching.look()
        return ys


def references(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)


def product(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w)


def views_alive(
    comm: Comm, width: int, mode: Backward, transform: bool, compile: bool = False
) -> tuple[int, int, int, int]:
    """The most views there were in the forward and in the backward pass, those there are after
    both, and how many buffers of their size the comm keeps, if it does."""
    buffers: dict[int, Any] = getattr(comm, "buffers", Buffers())._storages
    buffers.clear()
    plan, watching, x = plan_of(BLOCKS, width), Watching(comm), torch.ones(1, width)
    compute = compiled(product) if compile else product

    def layer(view: Block, x: Tensor) -> Tensor:
        watching.look()
        return compute(view["w"], x)

    run = sharded([layer] * BLOCKS, plan, watching, mode)
    if transform:
        y, pull = torch.func.vjp(run, shards_of(plan, comm), x)[:2]
    else:
        y = run(shards_of(plan, comm, requires_grad=True), x.requires_grad_())
    forward, watching.most = watching.most, 0
    watching.look()
    if (
        transform
    ):  # create_graph, which is the default, would keep the views for a second derivative
        pull(torch.ones_like(y), retain_graph=False, create_graph=False)
        del pull
    else:
        y.sum().backward()
    del y
    kept = len(buffers.get(plan.layouts[0].view_size * 4, ()))
    return forward, watching.most, watching.look(), kept


BLOCKS = 8
EXPECTED = {"regather": (2, 2, 0), "recompute": (2, 2, 0), "keep": (BLOCKS, BLOCKS, 0)}


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_no_more_than_two_blocks_are_whole_at_a_time(mode: Backward, transform: bool) -> None:
    arguments = [[a] * 2 for a in (4, mode, transform)]
    assert simulate(views_alive, MESH, *arguments) == [(*EXPECTED[mode], 0)] * 2


@pytest.mark.parametrize("mode", MODES)
def test_nor_where_blocks_are_compiled(mode: Backward) -> None:
    arguments = [[a] * 2 for a in (4, mode, False, True)]
    assert simulate(views_alive, MESH, *arguments) == [(*EXPECTED[mode], 0)] * 2


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_nor_on_real_ranks(ranks2: Farm, mode: Backward, transform: bool) -> None:
    arguments = [[a] * 2 for a in (4, mode, transform)]
    assert ranks2.run(views_alive, MESH, *arguments) == [(*EXPECTED[mode], 0)] * 2


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_nor_where_buffers_are_used_again(ranks2: Farm, mode: Backward, transform: bool) -> None:
    width = 512
    assert width * width * 4 >= SMALL
    for *_, kept in ranks2.run(views_alive, MESH, *([a] * 2 for a in (width, mode, transform))):
        assert kept == max(EXPECTED[mode])


def test_views_that_the_backward_pass_does_not_read_are_not_gathered_again() -> None:
    def program(comm: Comm) -> list[str]:
        plan, recording = plan_of(3, 4), Recording(comm)
        shards = shards_of(plan, comm, requires_grad=True)
        run = sharded([lambda view, x: x + view["w"].sum()] * 3, plan, recording, "regather")
        run(shards, torch.ones(1)).sum().backward()
        return [event.op.kind for event in recording.events if event.what == "start"]

    assert simulate(program, MESH) == [["all_gather"] * 3 + ["reduce_scatter"] * 3] * 2


def test_shards_that_change_before_they_are_gathered_again_are_refused() -> None:
    def program(comm: Comm, mode: Backward) -> None:
        plan = plan_of(2, 4)
        shards = shards_of(plan, comm, requires_grad=True)
        run = sharded([lambda view, x: x @ view["w"]] * 2, plan, comm, mode)
        loss = run(shards, torch.ones(1, 4, requires_grad=True)).sum()
        with torch.no_grad():
            shards[0]["w"].mul_(2)
        loss.backward()

    simulate(program, MESH, ["keep", "keep"])
    for mode in ("regather", "recompute"):
        with pytest.raises(RuntimeError, match="shards were changed in place after the forward"):
            simulate(program, MESH, [mode, mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_pass_that_is_dropped_is_freed(mode: Backward, fails: bool) -> None:
    """Its graph is no cycle: no backward pass and no garbage collector has to come first."""
    gc.collect()
    gc.disable()
    try:
        simulate(dropped, MESH, [mode] * MESH.size, [fails] * MESH.size)
    finally:
        gc.enable()


def dropped(comm: Comm, mode: Backward, fails: bool) -> None:
    plan, held = plan_of(3, 4), list[torch.UntypedStorage]()

    def block(view: Block, x: Tensor) -> Tensor:
        y = torch.tanh(x @ view["w"])
        held.append(y.untyped_storage())
        if fails and len(held) == 3:
            raise MemoryError
        return y.exp()

    run = sharded([block] * 3, plan, comm, mode)
    with suppress(MemoryError):
        run(shards_of(plan, comm, requires_grad=True), torch.ones(1, 4))
    assert len(held) == 3
    assert [references(x) for x in held] == [1] * 3, "what a backward pass would need is alive"
