"""T11: masters stay as they are under bfloat16 compute; reduce sums in the reduce dtype."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close, assert_rejects
from hypothesis import given
from torch import Tensor

from functional_ep import Precision, adamw, init_state, lm, make_train_step
from sharding import Comm, Mesh, expert_parallel, make_plan, sharded, simulate, zero3
from sharding.gather import Layout, gather, reduce
from sharding.testing import Case, cases, exact
from sharding.tree import flatten

MIXED = Precision(compute=torch.bfloat16, reduce=torch.float32)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
CFG = lm.Config(vocab=16, dim=16, layers=2, heads=2, experts=4, top_k=2, ffn=8)


def one_step(
    comm: Comm, precision: Precision | dict[str, Precision]
) -> tuple[list[Tensor], set[torch.dtype], dict[str, Tensor]]:
    params = lm.init(CFG, seed=0)
    plan = make_plan(params, lm.labels, RULES, comm.mesh, precision=precision)
    seen: set[torch.dtype] = set()
    loss = lm.loss(CFG, plan, comm)
    probe = sharded(lambda view: seen.update(x.dtype for x in flatten(view)[0]), plan, comm)
    step = make_train_step(loss, plan, adamw(1e-3), comm, clip=1.0)
    state = init_state(plan.shard(params, comm), plan, adamw(1e-3))
    ids = torch.arange(24).view(2, 12) % 16
    state, metrics = step(state, {"input_ids": ids, "labels": ids})
    probe(state.params)
    return flatten(state)[0], seen, metrics


def test_masters_and_moments_stay_float32() -> None:
    for leaves, seen, metrics in simulate(one_step, Mesh(edp=2, ep=2), [MIXED] * 4):
        assert seen == {torch.bfloat16}
        assert {x.dtype for x in leaves} == {torch.float32, torch.int64}
        assert bool(metrics["loss"].isfinite())
        assert bool(metrics["grad_norm"] > 0)


def test_bfloat16_compute_is_close_to_float32() -> None:
    """8 bits of mantissa: the first loss agrees to one part in a hundred."""
    mixed = simulate(one_step, Mesh(edp=2, ep=2), [MIXED] * 4)[0][2]["loss"]
    plain = simulate(one_step, Mesh(edp=2, ep=2), [Precision()] * 4)[0][2]["loss"]
    assert_close(mixed, plain, "loss", rtol=1e-2)
    assert not torch.equal(mixed, plain)


@pytest.mark.parametrize("half", ["dense", "expert"])
def test_labels_may_compute_in_different_dtypes(half: str) -> None:
    """Experts in bfloat16 among others in float32, or the reverse; rows travel as experts do."""

    def program(comm: Comm) -> tuple[Tensor, list[Tensor]]:
        params = lm.init(CFG, seed=0)
        precision = {half: MIXED}
        plan = make_plan(params, lm.labels, RULES, comm.mesh, precision=precision)
        loss = lm.loss(CFG, plan, comm)
        shards = plan.shard(params, comm)
        ids = torch.arange(24).view(2, 12) % 16
        mine = ids.tensor_split(comm.mesh.size)[comm.rank]
        grads = torch.func.grad(lambda p: loss(p, {"input_ids": mine, "labels": mine})[0])(shards)
        return one_step(comm, precision)[2]["loss"], flatten(plan.full(grads, comm))[0]

    (loss, grads), *_ = simulate(program, Mesh(edp=1, ep=1))
    plain = simulate(one_step, Mesh(edp=1, ep=1), [Precision()])[0][2]["loss"]
    assert_close(loss, plain, "loss", rtol=1e-2)
    assert not torch.equal(loss, plain)
    for found in simulate(program, Mesh(edp=1, ep=2)):
        for g, expected in zip(found[1], grads, strict=True):
            assert g.dtype == torch.float32
            assert_close(g, expected, "gradient on another mesh", rtol=2e-2)


@given(cases())
def test_views_are_rounded_masters_and_sums_are_not_rounded(case: Case) -> None:
    """Gather rounds once; reduce adds bfloat16 gradients in float32, exactly here."""
    rule, mesh, shape, seed = case
    mixed = Layout(rule, mesh, shape, torch.float32, MIXED)
    plain = Layout(rule, mesh, shape, torch.float32)

    def program(comm: Comm) -> tuple[Tensor, ...]:
        shard = exact((mixed.shard_size,), seed + comm.index(rule.axes), torch.float32) * 1.001
        g = exact(mixed.view_shape, seed + 100 + comm.rank, torch.float32)  # exact in bfloat16
        (view,), (whole,) = gather([mixed], [shard], comm), gather([plain], [shard], comm)
        (found,) = reduce([mixed], [g.bfloat16()], comm)
        (expected,) = reduce([plain], [g], comm)
        return view, whole, found, expected

    for view, whole, found, expected in simulate(program, mesh):
        assert torch.equal(view, whole.bfloat16())
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_tolerance_rejects_sums_in_bfloat16() -> None:
    ones = torch.full((300,), 1.0)
    total = torch.zeros((), dtype=torch.bfloat16)
    for x in ones.bfloat16():
        total = total + x
    assert_rejects(total.float(), ones.sum(), "a sum in bfloat16", rtol=1e-2)
