"""The language model: its errors, its logits, and what its loss counts."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
import reference
import torch
from closeness import assert_close
from laws import uneven
from optree import tree_leaves, tree_map
from torch import Tensor

from functional_ep import label_by_path, lm
from sharding import Comm, Mesh, Plan, Rule, expert_parallel, make_plan, simulate, zero3
from sharding.sharded import Backward

CFG = lm.Config(vocab=7, dim=8, layers=2, heads=2, experts=4, top_k=2, ffn=3)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
IDS = torch.arange(8).view(2, 4) % 7


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def plan_on(mesh: Mesh, params: Any) -> Plan:
    return make_plan(params, lm.labels, RULES, mesh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dim=6, heads=2), "dim=6 and heads=2: every head needs an even, equal share"),
        (dict(top_k=5), "top_k=5: choose from 1 to experts=4"),
        (dict(top_k=0), "top_k=0"),
        (dict(layers=0), "layers=0: at least 1"),
        (dict(dim=0), "dim=0: at least 1"),
        (dict(z=nan), "z=nan: at least 0, and finite"),
        (dict(balance=-0.1), "balance=-0.1: at least 0, and finite"),
        (dict(eps=inf), "eps=inf: at least 0, and finite"),
        (dict(theta=0.0), "theta=0.0: positive, and finite"),
        (dict(theta=-1.0), "theta=-1.0: positive, and finite"),
        (dict(theta=nan), "theta=nan: positive, and finite"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CFG, **change)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": IDS}, r"batch\['labels'\] is missing; the batch has \['input_ids'\]"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"\(2, 4\) and batch\['labels'\] \(2, 3\)"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, r"one shape \(B, S\)"),
        ((IDS, IDS), "a batch is a dict of input_ids and labels, not tuple"),
        ({"input_ids": IDS, "labels": IDS, "attention_mask": IDS[0]}, r"mask'\] \(4,\) must have"),
        ({"input_ids": IDS + 1, "labels": IDS}, r"batch\['input_ids'\] has 7: ids are 0 to 6"),
        ({"input_ids": IDS, "labels": IDS - 1}, r"has -1: ids are 0 to 6, or -100 for none"),
    ],
)
def test_batches_without_ids_and_labels_are_refused(batch: Any, message: str) -> None:
    def program(comm: Comm) -> None:
        params = lm.init(CFG)
        plan = plan_on(comm.mesh, params)
        lm.loss(CFG, plan, comm)(plan.shard(params, comm), batch)

    with pytest.raises(ValueError, match=message):
        simulate(program, Mesh(edp=1, ep=1))


def test_params_of_another_depth_are_refused() -> None:
    def program(comm: Comm) -> None:
        lm.apply(CFG, plan_on(comm.mesh, lm.init(uneven().cfg)), comm)

    with pytest.raises(ValueError, match="the config has 2 layers, the params have 1"):
        simulate(program, Mesh(edp=1, ep=1))


def test_a_router_that_would_know_of_its_own_experts_alone_is_refused() -> None:
    sliced = label_by_path({"*/experts/*": "expert", "*/router": "expert"}, default="dense")
    plan = make_plan(lm.init(CFG), sliced, RULES, Mesh(edp=1, ep=2))
    with pytest.raises(ValueError, match=r"\['router'\] .* splits it over \('ep',\) while comp"):
        simulate(lambda comm: lm.loss(CFG, plan, comm), plan.mesh)


def test_experts_of_one_layer_that_are_split_differently_are_refused() -> None:
    labels = label_by_path({"*/down": "down", "*/experts/*": "expert"}, default="dense")
    rules = RULES | {"down": Rule(store=("edp",))}

    def program(comm: Comm) -> None:
        lm.apply(CFG, make_plan(lm.init(CFG), labels, rules, comm.mesh), comm)

    with pytest.raises(ValueError, match="experts of one layer are split over"):
        simulate(program, Mesh(edp=1, ep=2))


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_the_params_and_take_no_memory(tied: bool) -> None:
    cfg = replace(CFG, tied=tied)
    found, params = (reference.named(x) for x in (lm.shapes(cfg, torch.float64), lm.init(cfg)))
    assert {path: x.shape for path, x in found.items()} == {p: x.shape for p, x in params.items()}
    assert {(x.device.type, x.dtype) for x in found.values()} == {("meta", torch.float64)}
    mesh = Mesh(edp=2, ep=2)
    assert plan_on(mesh, lm.shapes(cfg)) == plan_on(mesh, lm.init(cfg))


def test_initial_params_are_a_function_of_the_seed() -> None:
    one, two, other = (reference.named(lm.init(CFG, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[path], two[path]) for path in one)
    assert not torch.equal(one["embed"], other["embed"])
    assert not torch.equal(one["blocks/0/router"], one["blocks/1/router"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mesh", [Mesh(edp=1, ep=1), Mesh(edp=2, ep=2)], ids=repr)
def test_the_loss_is_the_cross_entropy_of_the_logits(tied: bool, mesh: Mesh) -> None:
    cfg = lm.Config(
        vocab=7, dim=8, layers=2, heads=2, experts=4, top_k=2, ffn=3, tied=tied, balance=0.0, z=0.0
    )
    targets = torch.where(IDS == 3, lm.IGNORE, IDS.flip(0))

    def program(comm: Comm) -> tuple[Tensor, Tensor, Tensor]:
        params = lm.init(cfg, 0, torch.float64)
        assert ("head" in params) is not tied
        plan = plan_on(comm.mesh, params)
        shards = plan.shard(params, comm)
        logits = lm.apply(cfg, plan, comm)(shards, IDS)
        batch = {"input_ids": IDS, "labels": targets}
        total, count, aux = lm.loss(cfg, plan, comm)(shards, batch)
        assert torch.equal(total, aux["nll"])
        return logits, total, count

    for logits, total, count in simulate(program, mesh):
        wanted = targets != lm.IGNORE
        picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        assert_close(total, -picked[wanted].sum(), "loss")
        assert int(count) == int(wanted.sum())


def test_positions_see_no_later_ones() -> None:
    def program(comm: Comm) -> tuple[Tensor, Tensor]:
        params = lm.init(CFG, 0, torch.float64)
        plan = plan_on(comm.mesh, params)
        logits, shards = lm.apply(CFG, plan, comm), plan.shard(params, comm)
        changed = IDS.clone()
        changed[:, 2] += 1
        return logits(shards, IDS), logits(shards, changed % 7)

    before, after = simulate(program, Mesh(edp=1, ep=1))[0]
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2:], after[:, 2:])


def test_padding_changes_nothing_that_is_counted() -> None:
    """Left of the padding everything is as without it, statistics included."""

    def program(comm: Comm, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        params = lm.init(CFG, 0, torch.float64)
        plan = plan_on(comm.mesh, params)
        total, _, aux = lm.loss(CFG, plan, comm)(plan.shard(params, comm), batch)
        return total, aux

    longer = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.int64)], 1)
    mask = torch.arange(7) < torch.tensor([[4], [4]])
    padded = {
        "input_ids": longer,
        "labels": torch.where(mask, longer, lm.IGNORE),
        "attention_mask": mask,
    }
    (plain,) = simulate(program, Mesh(edp=1, ep=1), [{"input_ids": IDS, "labels": IDS}])
    (found,) = simulate(program, Mesh(edp=1, ep=1), [padded])
    assert_close(found[0], plain[0], "loss")
    for name, x in plain[1].items():
        assert_close(found[1][name], x, name)


@pytest.mark.parametrize("backward", ["keep", "regather", "recompute"])
@pytest.mark.parametrize("mesh", [Mesh(edp=1, ep=1), Mesh(edp=2, ep=2)], ids=str)
def test_a_gradient_has_a_gradient(backward: Backward, mesh: Mesh) -> None:
    """In every mode, also on ranks without a sequence: that of the square of the gradient."""
    params: Any = lm.init(CFG, dtype=torch.float64)

    def program(comm: Comm, ids: Tensor, along: Any) -> Any:
        plan = plan_on(comm.mesh, params)
        loss, shards = lm.loss(CFG, plan, comm, backward), plan.shard(params, comm)
        batch = {"input_ids": ids, "labels": ids}
        along = plan.shard(along, comm)

        def slope(shards: Any) -> Tensor:
            """Of the loss of all ranks along a direction: a sum, of which each rank has a part."""
            grads = torch.func.grad(lambda s: loss(s, batch)[0])(shards)
            pairs = zip(tree_leaves(grads), tree_leaves(along), strict=True)
            return torch.stack([(g * a).sum() for g, a in pairs]).sum()

        by_reverse = torch.func.grad(slope)(shards)
        gradient = torch.func.grad(lambda s: loss(s, batch)[0])
        by_forward = torch.func.jvp(gradient, (shards,), (along,))[1]
        return plan.full(by_reverse, comm), plan.full(by_forward, comm)

    along = tree_map(lambda x: torch.randn(x.shape, dtype=x.dtype, generator=seeded()), params)
    mine = IDS.tensor_split(mesh.size)
    for by_reverse, by_forward in simulate(program, mesh, mine, [along] * mesh.size):
        pairs = zip(tree_leaves(by_reverse), tree_leaves(by_forward), strict=True)
        for found, expected in pairs:
            assert_close(found, expected, f"{backward} on {mesh}")


@pytest.mark.parametrize("backward", ["keep", "recompute"])
def test_what_padding_hides_is_kept_once_for_all_layers(backward: Backward) -> None:
    def program(comm: Comm) -> None:
        params = lm.init(CFG)
        plan = plan_on(comm.mesh, params)
        leaves: Any = tree_map(lambda x: x.requires_grad_(), plan.shard(params, comm))
        ids = torch.arange(12).view(2, 6) % 7
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        kept: set[int] = set()

        def keep(x: Tensor) -> Tensor:
            if x.shape[-2:] == (6, 6) and x.is_floating_point():
                kept.add(x.untyped_storage().data_ptr())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            lm.loss(CFG, plan, comm, backward)(leaves, batch)[0].backward()
        assert len(kept) == 1, "of a tensor for each position and position"

    simulate(program, Mesh(edp=1, ep=1))


def test_a_mask_is_no_reason_to_compute_otherwise_again() -> None:
    """Fused attention has no gradient for what is added: nobody may ask it for one."""

    def program(comm: Comm) -> None:
        params = lm.init(CFG)
        plan = plan_on(comm.mesh, params)
        shards = plan.shard(params, comm)
        batch = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}

        def gradient(mode: Backward) -> Any:
            loss = lm.loss(CFG, plan, comm, mode)
            return torch.func.grad(lambda p: loss(p, batch)[0])(shards)

        kept, again = gradient("keep"), gradient("recompute")
        assert all(map(torch.equal, tree_leaves(kept), tree_leaves(again)))

    simulate(program, Mesh(edp=1, ep=1))


def test_lanes_over_batches_meet_a_rank_without_tokens_once_each() -> None:
    params = lm.init(CFG, dtype=torch.float64)
    ids = torch.stack([IDS, IDS.flip(0)])

    def program(comm: Comm, ids: Tensor) -> Tensor:
        plan = plan_on(comm.mesh, params)
        loss, shards = lm.loss(CFG, plan, comm), plan.shard(params, comm)
        lane = lambda ids: loss(shards, {"input_ids": ids, "labels": ids})[2]["nll"]  # noqa: E731
        return torch.vmap(lane)(ids)

    (expected,) = simulate(program, Mesh(edp=1, ep=1), [ids])
    found = torch.stack(simulate(program, Mesh(edp=1, ep=2), [ids, ids[:, :0]])).sum(0)
    assert_close(found, expected, "nll of the lanes")
