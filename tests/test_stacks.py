"""Experts that are modules of their own: stacked for a plan, apart in files, dropped tokens too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_configs
import pytest
import torch
from hf_cases import batch_of, build, check, converted, differences, part_of, plan_of, reference
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from functional_ep import from_huggingface, to_huggingface
from functional_ep.huggingface.stacks import Stack
from sharding import Comm, Mesh, simulate

TYPE = "switch_transformers"
MESH = Mesh(edp=2, ep=2)
SOURCES = ("module", "state dict", "directory", "converted names")


def source_of(what: str, plain: Any, directory: Path) -> Any:
    plain.save_pretrained(directory)
    if what == "directory":
        return directory
    if what == "module":
        return plain
    if what == "state dict":
        return plain.state_dict()
    bare = from_huggingface(plain)
    plan = plan_of(bare, Mesh(edp=1, ep=1))
    return simulate(lambda comm: plan.full(bare.load(plan, comm), comm), plan.mesh)[0]


@pytest.mark.parametrize("what", SOURCES)
def test_there_and_back_from_anywhere_is_the_same_bits(what: str, tmp_path: Path) -> None:
    plain, out = build(TYPE), tmp_path / "out"
    source = source_of(what, plain, tmp_path / "in")
    bare = from_huggingface(source if what in ("directory", "module") else plain)

    def program(comm: Comm) -> dict[str, Tensor]:
        plan = plan_of(bare, comm.mesh)
        shards = bare.load(plan, comm, source)
        to_huggingface(out, shards, plan, comm, bare)
        return plan.full(shards, comm)

    (found, *_) = simulate(program, MESH)
    stack = "encoder.block.1.layer.1.mlp.experts.wi.weight"
    expert_2 = plain.get_parameter(stack.replace("experts", "experts.expert_2"))
    assert torch.equal(found[stack][2], expert_2)
    written, expected = load_file(out / "model.safetensors"), plain.state_dict()
    assert written.keys() == load_file(tmp_path / "in" / "model.safetensors").keys()
    again = AutoModelForSeq2SeqLM.from_pretrained(out).state_dict()
    assert again.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(again[name], expected[name])] == []


def test_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    plain = build(TYPE, num_experts=12)
    plain.save_pretrained(tmp_path)
    bare = from_huggingface(tmp_path)
    plan = plan_of(bare, Mesh(edp=1, ep=1))
    (found,) = simulate(lambda comm: bare.load(plan, comm), plan.mesh)
    stack = "decoder.block.1.layer.2.mlp.experts.wo.weight"
    apart = [
        plain.get_parameter(stack.replace("experts", f"experts.expert_{i}")) for i in range(12)
    ]
    assert torch.equal(found[stack].view(12, *apart[0].shape), torch.stack(apart))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    build(TYPE).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, lost = load_file(file), "encoder.block.1.layer.1.mlp.experts.expert_1.wi.weight"
    del tensors[lost]
    save_file(tensors, file)
    bare = from_huggingface(tmp_path)
    plan = plan_of(bare, Mesh(edp=1, ep=1))
    with pytest.raises(ValueError, match=f"{lost} is missing from .*model.safetensors"):
        simulate(lambda comm: bare.load(plan, comm), plan.mesh)


@pytest.mark.parametrize("backward", ["keep", "recompute"])
def test_every_backward_has_the_same_gradients(backward: Any) -> None:
    model = build(TYPE)
    batch = batch_of(model)
    found = simulate(lambda comm: converted(comm, model, batch, backward), MESH)
    check(found, reference(model, batch), backward)


def dropped_by(model: Any) -> list[int]:
    """How many tokens of each layer find no place at their expert."""
    dropped: list[int] = []

    def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
        dropped.append(int((inputs[1].sum((1, 2)) == 0).sum()))

    hooks = [
        module.register_forward_pre_hook(count)
        for module in model.modules()
        if type(module).__name__ == "SwitchTransformersExperts"
    ]
    reference(model, batch_of(model))
    for hook in hooks:
        hook.remove()
    return dropped


def test_some_tokens_of_the_tiny_model_are_dropped_and_it_matters() -> None:
    model = build(TYPE)
    batch = batch_of(model)
    assert min(dropped_by(model)) > 0
    roomy = build(TYPE, expert_capacity=64)
    assert max(dropped_by(roomy)) == 0
    found = simulate(lambda comm: converted(comm, model, batch), MESH)
    wrong = dict(differences(found, reference(roomy, batch)))
    assert wrong["logits"] > 1e-3 and wrong["gradient of shared.weight"] > 1e-3


def test_dropped_tokens_are_not_counted() -> None:
    model, batch = build(TYPE), batch_of(build(TYPE))
    del batch["attention_mask"]
    bare = from_huggingface(model)

    def program(comm: Comm) -> Tensor:
        plan = plan_of(bare, comm.mesh)
        part = part_of(batch, comm.mesh, comm.rank)
        return bare.loss(plan, comm)(bare.load(plan, comm), part)[2]["tokens_per_expert"]

    counts = torch.stack(simulate(program, MESH)).sum(0)
    (a, b), tokens = counts.sum(1).tolist(), batch["labels"].numel()
    assert 0 < a < tokens and 0 < b < tokens
    assert (counts <= len(batch["labels"]) * model.config.expert_capacity).all()


def test_a_router_in_float32_leaves_parameters_in_bfloat16_as_they_are() -> None:
    model = build(TYPE).bfloat16()
    batch = batch_of(model)
    bare = from_huggingface(model)  # before the plain model casts its routers in place

    def program(comm: Comm) -> tuple[Tensor, set[torch.dtype]]:
        plan = plan_of(bare, comm.mesh)
        leaves = {name: x.requires_grad_() for name, x in bare.load(plan, comm).items()}
        part = part_of(batch, comm.mesh, comm.rank)
        total = bare.loss(plan, comm, training=False)(leaves, part)[0]
        grads = torch.autograd.grad(total, list(leaves.values()))
        return total.detach(), {g.dtype for g in grads}

    found = simulate(program, MESH)
    total = sum(float(each) for each, _ in found) / int((batch["labels"] != -100).sum())
    assert all(dtypes == {torch.bfloat16} for _, dtypes in found)
    assert total == pytest.approx(float(reference(model, batch).loss), rel=2e-2)


def test_ranks_without_sequences_take_part() -> None:
    model = build(TYPE)
    batch = batch_of(model, sequences=3)
    assert [len(part_of(batch, MESH, rank)["labels"]) for rank in range(4)].count(0) == 1
    expected = reference(model, batch)
    for found in simulate(lambda comm: gradients_of(comm, model, batch), MESH):
        for name, g in found.items():
            torch.testing.assert_close(g, expected.grads[name], rtol=1e-4, atol=1e-6)


def gradients_of(comm: Comm, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    bare = from_huggingface(model)
    plan = plan_of(bare, comm.mesh)
    leaves = {name: x.requires_grad_() for name, x in bare.load(plan, comm).items()}
    total = bare.loss(plan, comm, training=False)(leaves, part_of(batch, comm.mesh, comm.rank))[0]
    grads = torch.autograd.grad(total / (batch["labels"] != -100).sum(), list(leaves.values()))
    return plan.full(dict(zip(leaves, grads, strict=True)), comm)


def test_router_losses_that_would_be_lost_are_refused() -> None:
    model = build(TYPE)
    batch: dict[str, Any] = {**batch_of(model), "output_router_logits": True}
    bare = from_huggingface(model)
    plan = plan_of(bare, Mesh(edp=1, ep=1))
    with pytest.raises(ValueError, match="leave output_router_logits out of the batch"):
        simulate(lambda comm: bare.loss(plan, comm)(bare.load(plan, comm), batch), plan.mesh)


def test_models_without_separate_experts_keep_their_modules() -> None:
    stacks = {
        name: any(isinstance(m, Stack) for m in from_huggingface(build(name)).skeleton.modules())
        for name in (TYPE, "mixtral")
    }
    assert stacks == {TYPE: True, "mixtral": False}
    assert TYPE in hf_configs.CONVERTED
