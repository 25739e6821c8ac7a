"""Adapters of peft, on attention and on routed experts: gradients, training, and files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import RULES, build
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from functional_ep import (
    adamw,
    from_huggingface,
    init_state,
    make_train_step,
    to_huggingface,
    train_only,
)
from functional_ep.huggingface.model import Model
from sharding import Comm, Mesh, Plan, make_plan, simulate

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MESHES = (Mesh(edp=1, ep=1), Mesh(edp=2, ep=1), Mesh(edp=2, ep=2), Mesh(edp=1, ep=4))
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")  # the last stores matrices the other way round
FILE = "adapter_model.safetensors"
IDS = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(0))


def config(parameters: list[str] = EXPERTS, **changed: Any) -> LoraConfig:
    targets = ["q_proj", "v_proj"]
    return LoraConfig(r=2, target_modules=targets, target_parameters=parameters, **changed)


def adapted(family: str, parameters: list[str] = EXPERTS) -> Any:
    """A tiny model with an adapter that does something."""
    model = get_peft_model(build(family), config(parameters))
    random = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data = torch.randn(p.shape, generator=random) * 0.3
    return model


def plan_of(model: Model, mesh: Mesh) -> Plan:
    labels, rules, frozen = train_only(model.labels, RULES, "*.lora_*")
    return make_plan(model.shapes, labels, rules, mesh, frozen=frozen)


def gradients(comm: Comm, model: Model) -> tuple[Tensor, dict[str, Tensor]]:
    plan = plan_of(model, comm.mesh)
    shards = {name: x.requires_grad_() for name, x in model.load(plan, comm).items()}
    mine = IDS.tensor_split(comm.mesh.size)[comm.rank]
    logits = model.apply(plan, comm)(shards, input_ids=mine).logits
    logits.square().sum().backward()
    zero = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in shards.items()}
    return logits.detach(), plan.full(zero, comm)


def is_that_of_peft(family: str, mesh: Mesh) -> None:
    plain = adapted(family)
    expected = plain(input_ids=IDS).logits
    expected.square().sum().backward()
    expected = expected.detach()
    results = simulate(gradients, mesh, [from_huggingface(plain)] * mesh.size)
    logits = torch.cat([found for found, _ in results])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for name, p in plain.get_base_model().named_parameters():
        found = results[0][1][name]
        if p.grad is None:
            assert not found.any(), f"{name} is frozen and has a gradient"
        else:
            off = (found - p.grad).abs().max() / p.grad.abs().max()
            assert off < 1e-5, f"the gradient of {name} is off by {off:.1e}"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_have_the_gradients_of_peft(family: str, mesh: Mesh) -> None:
    is_that_of_peft(family, mesh)


def test_columns_of_other_experts_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank takes the columns of B that are its own experts', not the first ones."""
    from functional_ep.huggingface.experts import Place

    monkeypatch.setattr(Place, "first", property(lambda self: 0))
    with pytest.raises(AssertionError):
        is_that_of_peft("mixtral", Mesh(edp=1, ep=2))


def test_an_adapter_that_is_turned_off_adds_nothing() -> None:
    plain = adapted("mixtral")
    with plain.disable_adapter():
        model, expected = from_huggingface(plain), plain(input_ids=IDS).logits

    def logits(comm: Comm) -> Tensor:
        plan = plan_of(model, comm.mesh)
        return model.apply(plan, comm)(model.load(plan, comm), input_ids=IDS).logits

    for found in simulate(logits, Mesh(edp=1, ep=2)):
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(plain(input_ids=IDS).logits, expected)


def trained(comm: Comm, model: Model, out: Path) -> tuple[list[float], Tensor]:
    plan, optimizer = plan_of(model, comm.mesh), adamw(1e-2)
    step = make_train_step(model.loss(plan, comm), plan, optimizer, comm, clip=1.0)
    state = init_state(model.load(plan, comm), plan, optimizer)
    mine = IDS.tensor_split(comm.mesh.size)[comm.rank]
    losses: list[float] = []
    for _ in range(4):
        state, metrics = step(state, {"input_ids": mine[:, :-1], "labels": mine[:, 1:]})
        losses.append(float(metrics["loss"]))
    to_huggingface(out, state.params, plan, comm, model)
    return losses, model.apply(plan, comm)(state.params, input_ids=IDS).logits


def test_a_directory_is_given_an_adapter_that_peft_loads_again(tmp_path: Path) -> None:
    plain = build("mixtral")
    plain.save_pretrained(tmp_path / "base")
    model = from_huggingface(tmp_path / "base", adapter=config())
    expected: list[float] = []
    for mesh in (Mesh(edp=1, ep=1), Mesh(edp=2, ep=2)):
        out = tmp_path / f"{mesh.size}"
        losses, logits = simulate(trained, mesh, [model] * mesh.size, [out] * mesh.size)[0]
        expected = expected or losses
        assert losses == pytest.approx(expected, rel=1e-6), "the same adapter on every mesh"
        again = PeftModel.from_pretrained(copy.deepcopy(plain), out).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, logits)
        assert not torch.allclose(plain(input_ids=IDS).logits, logits), "it has learned something"


def test_a_fresh_adapter_adds_nothing_and_begins_as_that_of_peft(tmp_path: Path) -> None:
    plain = build("mixtral")
    plain.save_pretrained(tmp_path)
    model, mesh = from_huggingface(tmp_path, adapter=config()), Mesh(edp=1, ep=2)
    results = simulate(gradients, mesh, [model] * mesh.size)
    torch.testing.assert_close(torch.cat([x for x, _ in results]), plain(input_ids=IDS).logits)

    def a_of(comm: Comm) -> dict[str, Tensor]:
        plan = plan_of(model, mesh)
        return plan.full(model.load(plan, comm), comm)

    ours = simulate(a_of, mesh)[0]
    theirs = get_peft_model(plain, config()).get_base_model().named_parameters()
    for name, p in theirs:
        if ".lora_B." in name:
            assert not ours[name].any() and not p.any()
        elif ".lora_A." in name:
            assert ours[name].std() == pytest.approx(float(p.detach().std()), rel=0.35)
            assert ours[name].abs().max() <= p.shape[-1] ** -0.5


DTYPES = [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("asked", "kept"), DTYPES, ids=["double", "half"])
def test_an_adapter_is_held_and_written_in_the_dtype_that_peft_keeps_it_in(
    asked: torch.dtype, kept: torch.dtype, tmp_path: Path
) -> None:
    plain = build("mixtral")
    plain.save_pretrained(tmp_path / "base")
    model = from_huggingface(tmp_path / "base", dtype=asked, adapter=config())
    theirs = get_peft_model(plain.to(asked), config()).get_base_model().named_parameters()
    assert {name: x.dtype for name, x in model.shapes.items()} == {n: p.dtype for n, p in theirs}
    expected: list[float] = []
    for mesh in (Mesh(edp=1, ep=1), Mesh(edp=1, ep=4)):
        out = tmp_path / f"{mesh.size}"
        losses, _ = simulate(trained, mesh, [model] * mesh.size, [out] * mesh.size)[0]
        written = load_file(out / FILE).values()
        assert {x.dtype for x in written} == {kept}
        expected = expected or losses
        assert losses == pytest.approx(expected, rel=1e-12 if asked == kept else 1e-2)


def test_an_adapter_of_a_half_model_is_written_as_it_is_held(tmp_path: Path) -> None:
    plain, mesh = adapted("mixtral"), Mesh(edp=1, ep=2)
    for name, p in plain.named_parameters():
        p.data = p.data if ".lora_" in name else p.data.bfloat16()
    plain.save_pretrained(tmp_path / "peft")
    model = from_huggingface(plain)

    def program(comm: Comm) -> None:
        plan = plan_of(model, mesh)
        to_huggingface(tmp_path / "ours", model.load(plan, comm), plan, comm, model)

    simulate(program, mesh)
    found, expected = (load_file(tmp_path / by / FILE) for by in ("ours", "peft"))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], x), name


# -- what is refused -------------------------------------------------------------------------------


def test_an_initialisation_that_needs_weights_is_refused(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' needs whole weights. Attach"):
        from_huggingface(tmp_path, adapter=config(init_lora_weights="pissa"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"use_dora": True, "target_parameters": None},
            r"magnitude_vector.*only lora_A and lora_B",
        ),
        ({"target_modules": ["embed_tokens"]}, r"lora_embedding_A.*get_peft_model"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head.*get_peft_model"),
    ],
)
def test_what_would_begin_wrong_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build("mixtral").save_pretrained(tmp_path)
    arguments: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    with pytest.raises(ValueError, match=message):
        from_huggingface(tmp_path, adapter=LoraConfig(r=2, **{**arguments, **changed}))


def test_another_adapter_than_lora_is_refused(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"adapter='lora': a LoraConfig of peft is needed"):
        from_huggingface(tmp_path, adapter="lora")


def test_a_trained_base_is_not_lost_without_a_word(tmp_path: Path) -> None:
    model, mesh = from_huggingface(adapted("mixtral")), Mesh(edp=1, ep=1)

    def program(comm: Comm) -> None:
        plan = make_plan(model.shapes, model.labels, RULES, mesh)
        to_huggingface(tmp_path / "out", model.load(plan, comm), plan, comm, model)

    with pytest.raises(ValueError, match=r"is trained, but only the adapter would be written"):
        simulate(program, mesh)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_parameter_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"mlp\.gate \(ParamWrapper\).*'weight'.*by target_modules"
    ):
        from_huggingface(adapted("mixtral", ["mlp.gate.weight"]))


def test_two_adapters_are_not_written(tmp_path: Path) -> None:
    plain = adapted("mixtral")
    plain.add_adapter("second", config())
    model, mesh = from_huggingface(plain), Mesh(edp=1, ep=1)

    def program(comm: Comm) -> None:
        plan = plan_of(model, mesh)
        to_huggingface(tmp_path / "out", model.load(plan, comm), plan, comm, model)

    with pytest.raises(ValueError, match=r"carries the adapters \['default', 'second'\]"):
        simulate(program, mesh)
    assert not (tmp_path / "out").exists()


def test_no_model_is_taken_for_an_adapter() -> None:
    with pytest.raises(TypeError, match="takes a transformers model"):
        from_huggingface(nn.Linear(1, 1))
