"""Conversion of transformers models: what is found, what is refused, what never changes a bit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import RULES, batch_of, build, part_of, plan_of
from hf_configs import CONVERTED
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

import functional_ep.huggingface as huggingface
from functional_ep import from_huggingface, label_by_path
from functional_ep.differentiate import sum_over_ranks
from functional_ep.huggingface import next_tokens
from functional_ep.huggingface.model import Model
from functional_ep.huggingface.parts import parts
from sharding import Comm, Mesh, expert_parallel, make_plan, simulate
from sharding.simulate import PerRank
from sharding.walk import Backward

BACKWARDS: tuple[Backward, ...] = ("keep", "regather", "recompute")
MESH = Mesh(edp=2, ep=2)


def gradients(
    model: Any, mesh: Mesh = MESH, backward: Backward = "regather", **options: Any
) -> list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Each rank's (mean loss, gradient shards, aux)."""
    bare, batch = from_huggingface(model), batch_of(model)
    plan = plan_of(bare, mesh)
    given: dict[str, Any] = {"training": False} | options

    def program(comm: Comm) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        shards = {n: x.requires_grad_() for n, x in bare.load(plan, comm).items()}
        loss = bare.loss(plan, comm, backward, **given)
        total, count, aux = loss(shards, part_of(batch, mesh, comm.rank))
        grads = torch.autograd.grad(total, list(shards.values()), materialize_grads=True)
        total, count = sum_over_ranks([total.detach(), count], comm)
        return total / count, dict(zip(shards, grads, strict=True)), aux

    return simulate(program, mesh)


# -- what is found -------------------------------------------------------------------------------


def test_leaves_are_named_as_the_parameters_are_and_a_tied_one_appears_once() -> None:
    model = build("mixtral", tie_word_embeddings=True)
    bare = from_huggingface(model)
    assert list(bare.shapes) == [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in bare.shapes
    assert all(
        x.is_meta and x.shape == dict(model.named_parameters())[n].shape
        for n, x in bare.shapes.items()
    )
    assert bare.labels == label_by_path({"*.mlp.experts.*": "expert"}, default="dense")(bare.shapes)
    using = [
        part.path for part in parts(bare.skeleton) if "model.embed_tokens.weight" in part.leaves
    ]
    assert using == ["model.embed_tokens", "lm_head"]


def test_weights_come_from_a_state_dict_or_a_module_as_well() -> None:
    model, other = build("mixtral"), build("mixtral", seed=1)
    bare, mesh = from_huggingface(model.config), Mesh(edp=2, ep=2)

    def program(comm: Comm) -> list[dict[str, Tensor]]:
        plan = plan_of(bare, mesh)
        sources = (model, model.state_dict(), other.state_dict())
        return [plan.full(bare.load(plan, comm, weights), comm) for weights in sources]

    for from_module, from_dict, from_other in simulate(program, mesh):
        for name, p in model.named_parameters():
            assert torch.equal(from_module[name], p) and torch.equal(from_dict[name], p)
        assert not torch.equal(from_other["lm_head.weight"], from_dict["lm_head.weight"])


def test_units_are_the_layers_and_the_modules_outside_of_them() -> None:
    found = [part.path for part in parts(build("qwen3_moe"))]
    layers = ["model.layers.0", "model.layers.1"]
    assert found == ["model.embed_tokens", *layers, "model.norm", "lm_head"]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gemma4_text", "afmoe"])
def test_buffers_of_a_model_on_meta_are_those_of_a_real_one(model_type: str) -> None:
    model = build(model_type)
    with torch.device("meta"):
        empty = type(model)(model.config)
    before = torch.random.get_rng_state()
    found, expected = from_huggingface(empty).buffers, from_huggingface(model).buffers
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.keys() == expected.keys() != set[str]()
    for name, x in expected.items():
        if not name.endswith("_bias"):  # which build() has set, as files would
            assert torch.equal(found[name], x), name


def test_what_the_class_does_not_train_is_a_constant() -> None:
    bare = from_huggingface(build("afmoe"))
    name = next(name for name in bare.buffers if name.endswith("expert_bias"))
    assert name not in bare.shapes and bare.buffers[name].shape == (4,)


def test_a_directory_is_described_without_reading_a_weight(tmp_path: Path) -> None:
    model = build("mixtral")
    model.config.save_pretrained(tmp_path)
    model.config.architectures = None
    for source in (tmp_path, str(tmp_path), model.config):
        bare = from_huggingface(source)
        assert bare.labels == from_huggingface(model).labels
        assert isinstance(bare.skeleton, MixtralForCausalLM)


def test_a_plain_import_does_not_import_transformers() -> None:
    check = "import sys, functional_ep; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_page_lists_what_is_checked() -> None:
    page = (Path(__file__).parents[1] / "docs" / "huggingface.md").read_text("utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    assert {row[1].strip() for row in rows if row[3].strip() == "converted"} == set(CONVERTED)


# -- what never changes a bit --------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v2", "step3p7", "jamba"])
def test_when_views_are_gathered_changes_no_bit(model_type: str) -> None:
    results = [gradients(build(model_type), backward=backward) for backward in BACKWARDS]
    for other in results[1:]:
        for (loss, grads, _), (other_loss, other_grads, _) in zip(results[0], other, strict=True):
            assert torch.equal(loss, other_loss)
            assert all(torch.equal(g, other_grads[name]) for name, g in grads.items())


def test_dropout_is_replayed_and_is_each_ranks_own() -> None:
    model = build("mixtral", attention_dropout=0.3)
    results = [gradients(model, backward=b, training=True) for b in BACKWARDS]
    still = gradients(model, training=False)
    assert not torch.equal(results[0][0][0], still[0][0])
    for other in results[1:]:
        for (_, grads, _), (_, other_grads, _) in zip(results[0], other, strict=True):
            assert all(torch.equal(g, other_grads[name]) for name, g in grads.items())


@pytest.mark.parametrize("backward", BACKWARDS)
def test_router_logits_are_recorded_and_have_a_gradient(backward: Backward) -> None:
    model = build("mixtral", output_router_logits=True, router_aux_loss_coef=100.0)
    plain = gradients(build("mixtral"))
    found = gradients(model, backward=backward)
    expected = gradients(model, backward="keep")
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.equal(found[0][1][gate], expected[0][1][gate])
    assert not torch.allclose(found[0][1][gate], plain[0][1][gate], rtol=0.5)


def test_apply_returns_what_the_model_returns() -> None:
    model, mesh = build("mixtral"), Mesh(edp=1, ep=2)
    inputs = {k: x for k, x in batch_of(model).items() if k != "labels"}
    asked = {"output_router_logits": True, "output_hidden_states": True}
    expected = model(**inputs, **asked)
    bare = from_huggingface(model)
    plan = plan_of(bare, mesh)
    for backward in BACKWARDS:

        def program(comm: Comm, backward: Backward = backward) -> Any:
            f = bare.apply(plan, comm, backward)
            return f(bare.load(plan, comm), **inputs, **asked)

        for found in simulate(program, mesh):
            assert type(found) is type(expected)
            for name in ("router_logits", "hidden_states"):
                for x, y in zip(found[name], expected[name], strict=True):
                    torch.testing.assert_close(x, y)
            torch.testing.assert_close(found.aux_loss, expected.aux_loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_models_own(attention: str) -> None:
    model = build("mixtral")
    model.set_attn_implementation(attention)
    bare, inputs = from_huggingface(model), {"input_ids": batch_of(model)["input_ids"]}
    assert bare.skeleton.config._attn_implementation == attention
    plan = plan_of(bare, MESH)
    for found in simulate(lambda c: bare.apply(plan, c)(bare.load(plan, c), **inputs), MESH):
        torch.testing.assert_close(found.logits, model(**inputs).logits)


def test_a_rank_that_fails_leaves_nothing_behind() -> None:
    model = build("mixtral")
    bare, plan = from_huggingface(model), plan_of(from_huggingface(model), Mesh(edp=1, ep=1))

    def program(comm: Comm) -> Tensor:
        f, shards = bare.apply(plan, comm), bare.load(plan, comm)
        with pytest.raises(IndexError):
            f(shards, input_ids=torch.tensor([[10_000]]))
        return f(shards, input_ids=torch.tensor([[5, 6]])).logits

    expected = model(input_ids=torch.tensor([[5, 6]])).logits
    torch.testing.assert_close(simulate(program, plan.mesh)[0], expected)


def test_a_parameter_that_is_read_outside_of_its_module_is_gathered() -> None:
    class Peeking(MixtralForCausalLM):
        model: Any

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs: Any = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * self.model.layers[1].input_layernorm.weight.sum()
            return outputs

    model = Peeking(build("mixtral").config).eval()
    bare, ids = from_huggingface(model), torch.tensor([[5, 6, 7]])
    plan = plan_of(bare, MESH)
    for found in simulate(lambda c: bare.apply(plan, c)(bare.load(plan, c), input_ids=ids), MESH):
        torch.testing.assert_close(found.logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_router_loss_is_global_unless_asked_otherwise() -> None:
    model = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    one = gradients(model, Mesh(edp=1, ep=1))[0][0]
    torch.testing.assert_close(gradients(model, MESH)[0][0], one, rtol=1e-6, atol=0)
    local = [
        gradients(model, mesh, router_loss="micro_batch")[0][0]
        for mesh in (Mesh(ep=1, edp=1), MESH)
    ]
    torch.testing.assert_close(local[0], one, rtol=1e-6, atol=0)
    assert abs(float(local[1] - one)) > 1e-3


def test_aux_counts_the_tokens_of_every_expert() -> None:
    model = build("qwen3_moe")
    tokens = int(batch_of(model)["attention_mask"].sum())
    aux = [aux for _, _, aux in gradients(model)]
    assert sum(int(a["tokens"]) for a in aux) == tokens
    counts = torch.stack([a["tokens_per_expert"] for a in aux]).sum(0)
    assert counts.shape == (2, 4) and counts.sum(1).tolist() == [2 * tokens] * 2


def test_vision_tokens_on_one_rank_only() -> None:
    model, mesh = build("ernie4_5_vl_moe"), Mesh(edp=1, ep=2)
    ids = batch_of(model, sequences=2)["input_ids"]
    kinds = torch.zeros_like(ids)
    kinds[1, 2:5] = 1
    bare = from_huggingface(model)
    plan = plan_of(bare, mesh)

    def program(comm: Comm, ids: Tensor, kinds: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "moe_mm_token_type_ids": kinds[None]}
        return bare.apply(plan, comm)(bare.load(plan, comm), **inputs).logits

    rows: PerRank = ids
    found = torch.cat(simulate(program, mesh, rows, kinds))
    torch.testing.assert_close(found, model(input_ids=ids, moe_mm_token_type_ids=kinds).logits)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_bfloat16_routes_as_transformers_does(model_type: str) -> None:
    model, mesh = build(model_type).bfloat16(), Mesh(edp=1, ep=2)
    model.set_experts_implementation("grouped_mm")
    inputs = {"input_ids": batch_of(model, sequences=4)["input_ids"]}
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
        for module in model.modules()
        if hasattr(module, "_is_expert_parallel")
    ]
    expected = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    bare = from_huggingface(model)
    plan = plan_of(bare, mesh)

    def program(comm: Comm) -> tuple[list[Tensor], Tensor]:
        f: Any = bare.apply(plan, comm)
        logits = f(bare.load(plan, comm), **inputs).logits
        return list(f.chosen.values()), logits

    for ids, logits in simulate(program, mesh):
        assert len(ids) == len(chosen) > 0
        assert all(torch.equal(x, y) for x, y in zip(ids, chosen, strict=True))
        torch.testing.assert_close(logits, expected)


def test_next_tokens_are_the_labels_of_transformers() -> None:
    model = build("mixtral")
    ids = batch_of(model)["input_ids"]
    expected = model(input_ids=ids, labels=ids).loss
    bare, mesh = from_huggingface(model), Mesh(edp=1, ep=1)
    plan = plan_of(bare, mesh)
    batch = {"input_ids": ids, "labels": next_tokens(ids)}
    total, count, _ = simulate(
        lambda c: bare.loss(plan, c, training=False)(bare.load(plan, c), batch), mesh
    )[0]
    torch.testing.assert_close(total / count, expected)


# -- what is refused -----------------------------------------------------------------------------


def refused(source: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        from_huggingface(source)


def test_models_that_cannot_be_converted_are_refused_with_path_and_reason() -> None:
    small: Any = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    dense = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=2))
    refused(dense, ValueError, "no routed experts found: LlamaForCausalLM has no module")
    refused(build("doge"), ValueError, r"model\.layers\.0\.mlp \(DogeCDMoE\).*mixes the logits")
    refused(nn.Linear(1, 1), TypeError, "not a Linear; a plain torch module has no config")
    refused(3, TypeError, "takes a transformers model, its config, or a directory, not a int")
    model = build("mixtral")
    model.model.layers[1].gradient_checkpointing = True
    refused(model, ValueError, r"gradient checkpointing is on.*backward='recompute'")


def test_directories_without_a_config_or_with_an_unknown_one_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, FileNotFoundError, "no config.json there")
    LlamaConfig(architectures=["NoSuchModel"]).save_pretrained(tmp_path)
    config = LlamaConfig(architectures=["NoSuchModel"])
    assert type(config).model_type == "llama"
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    refused(tmp_path, ValueError, "transformers has no causal language model for it")


def test_experts_that_do_not_divide_are_refused_by_name() -> None:
    bare = from_huggingface(build("mixtral"))
    name = r"params\['model\.layers\.0\.mlp\.experts\.down_proj'\] \(4, 32, 24\)"
    with pytest.raises(ValueError, match=rf"{name}.*must divide by the 3 ranks.*divides 4"):
        make_plan(bare.shapes, bare.labels, RULES, Mesh(edp=1, ep=3))
    bare = from_huggingface(build("dbrx"))  # whose rows divide where its experts do not
    plan = make_plan(bare.shapes, bare.labels, RULES, Mesh(edp=1, ep=8))
    with pytest.raises(ValueError, match=r"ffn\.experts: 4 experts do not divide by the 8 ranks"):
        simulate(lambda comm: bare.apply(plan, comm), plan.mesh)


def one_rank(bare: Model, f: Any) -> Any:
    plan = plan_of(bare, Mesh(edp=1, ep=1))
    return simulate(lambda comm: f(plan, comm), plan.mesh)[0]


def test_bad_input_is_one_clear_error() -> None:
    model = build("mixtral")
    bare, batch = from_huggingface(model), batch_of(model)
    other = from_huggingface(build("qwen3_moe"))
    ids = batch["input_ids"]

    def loss(plan: Any, comm: Comm, batch: Any, **options: Any) -> Any:
        return bare.loss(plan, comm, **options)(bare.load(plan, comm), batch)

    for match, call in {
        "the plan was made for other params": lambda p, c: other.load(p, c),
        "a config has no weights": lambda p, c: from_huggingface(model.config).load(p, c),
        "is on the meta device": lambda p, c: from_huggingface(bare.skeleton).load(p, c),
        "the input ids themselves": lambda p, c: loss(p, c, {"input_ids": ids, "labels": ids}),
        "a batch is a dict .*, not list": lambda p, c: loss(p, c, [ids, ids]),
        "a batch has input_ids and labels": lambda p, c: loss(p, c, {"input_ids": ids}),
        "must have one shape": lambda p, c: loss(p, c, {"input_ids": ids, "labels": ids[:1]}),
        "router_loss='local'": lambda p, c: loss(p, c, batch, router_loss="local"),
        "backward='never'": lambda p, c: loss(p, c, batch, backward="never"),
        "written to twice": lambda p, c: bare.apply(p, c, "recompute")(
            bare.load(p, c), input_ids=ids, use_cache=True
        ),
        r"splits it over \('ep',\) while computing": lambda p, c: bare.loss(
            replace(p, rules={**p.rules, "dense": expert_parallel("ep")}), c
        ),
        "shards do not have the structure": lambda p, c: bare.apply(p, c)({}, input_ids=ids),
    }.items():
        with pytest.raises(ValueError, match=match):
            one_rank(bare, call)


def test_transformers_absent_or_of_another_age_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> str:
        raise huggingface.PackageNotFoundError(name)

    monkeypatch.setattr(huggingface, "version", absent)
    refused("x", ImportError, r"transformers, which is absent: pip install 'functional-ep\[hf\]'")
    for age in ("4.57.1", "6.0.0"):
        monkeypatch.setattr(huggingface, "version", lambda name, age=age: age)
        refused("x", ImportError, rf"another transformers than {age}: pip install")
