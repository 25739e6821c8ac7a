"""T14: a converted transformers model has the loss and the gradients of the plain one."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import hf_cases
import hf_configs
import pytest
import torch
from farm import Farm
from hf_cases import batch_of, build, check, converted, converted_type, part_of, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import functional_ep.huggingface.experts as experts
from functional_ep import adamw, constant, from_huggingface, init_state, make_train_step
from functional_ep.moe import dispatch
from sharding import Comm, Mesh, simulate

MESHES = [
    Mesh(edp=1, ep=1),
    Mesh(edp=2, ep=1),
    Mesh(edp=1, ep=2),
    Mesh(edp=2, ep=2),
    Mesh(edp=1, ep=4),
]
REAL = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "jamba")


def meshes_for(model_type: str) -> list[Mesh]:
    """All of them at night; by day two, so that every mesh has its share of the types."""
    if settings().max_examples > 1000:
        return MESHES
    first = crc32(model_type.encode())
    return [MESHES[first % 5], MESHES[(first + 3) % 5]]


KNOWN = [name for name in hf_configs.CONVERTED if name in CONFIG_MAPPING]  # older ones know fewer


@pytest.mark.parametrize("model_type", KNOWN)
def test_every_model_type_keeps_its_loss_its_logits_and_its_gradients(model_type: str) -> None:
    model = build(model_type)
    batch = batch_of(model)
    expected = reference(model, batch)
    for mesh in meshes_for(model_type):
        found = simulate(lambda comm: converted(comm, model, batch), mesh)
        check(found, expected, f"{model_type} on {mesh}")


def test_there_are_as_many_as_promised() -> None:
    assert len(KNOWN) > 60 and set(REAL) <= set(KNOWN)


def check_real(ranks: Farm, mesh: Mesh, model_type: str) -> None:
    model = build(model_type)
    expected = reference(model, batch_of(model))
    types = [model_type] * mesh.size
    check(ranks.run(converted_type, mesh, types), expected, f"{model_type} on {mesh}")


@pytest.mark.parametrize("model_type", REAL)
def test_real_ranks_do_too(ranks2: Farm, ranks4: Farm, model_type: str) -> None:
    check_real(ranks2, Mesh(edp=1, ep=2), model_type)
    check_real(ranks4, Mesh(edp=2, ep=2), model_type)


def test_wrong_answers_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh = build("mixtral"), Mesh(edp=1, ep=2)
    batch = batch_of(model)
    expected = reference(model, batch)
    right = simulate(lambda comm: converted(comm, model, batch), mesh)
    check(right, expected, "right")
    expert = [name for name in expected.grads if ".experts." in name]
    averaged = {name: g / 2 if name in expert else g for name, g in right[0].grads.items()}
    with pytest.raises(AssertionError, match=r"gradient of .*experts"):
        check([each._replace(grads=averaged) for each in right], expected, "averaged over ep")

    def swapped(x: Tensor, ids: Tensor, *rest: Any) -> Any:
        return dispatch(x, ids ^ 1, *rest)

    monkeypatch.setattr(experts, "dispatch", swapped)
    wrong = simulate(lambda comm: converted(comm, model, batch), mesh)
    with pytest.raises(AssertionError, match="logits"):
        check(wrong, expected, "two experts swapped")


FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe")
STRUCTURE = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(2, 3),
        "hidden_size": st.sampled_from([16, 32]),
        "num_experts_per_tok": st.integers(2, 4),
    }
)


@settings(max_examples=10 if settings().max_examples < 1000 else 300)
@given(
    st.sampled_from(FAMILIES), STRUCTURE, st.sampled_from(MESHES), st.integers(1, 6), st.integers(0)
)
def test_random_configs_on_random_meshes(
    model_type: str, structure: dict[str, int], mesh: Mesh, sequences: int, seed: int
) -> None:
    seed %= 1000
    model = build(model_type, seed, **structure)
    batch = batch_of(model, seed, max(sequences, mesh.size))
    expected = reference(model, batch)
    found = simulate(lambda comm: converted(comm, model, batch), mesh)
    check(found, expected, f"{model_type} {structure} on {mesh}")


RATE, DECAY, BETAS, CLIP, STEPS = 1e-3, 0.1, (0.9, 0.95), 1.0, 10


def plain_steps(model: Any, batches: list[dict[str, Tensor]]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of transformers with torch's own optimizer."""
    optimizer = torch.optim.AdamW(
        model.parameters(), RATE, BETAS, eps=1e-8, weight_decay=DECAY, foreach=False
    )
    history: list[tuple[float, float]] = []
    for batch in batches:
        loss, _, grads = reference(model, batch)
        for name, p in model.named_parameters():
            p.grad = grads[name]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        history.append((float(loss), float(norm)))
    return history


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_ten_steps_are_those_of_torch(model_type: str) -> None:
    model = build(model_type, output_router_logits=True, router_aux_loss_coef=0.02)
    batches = [batch_of(model, seed, 6) for seed in range(STEPS)]
    mesh, tx = Mesh(edp=2, ep=2), adamw(constant(RATE), *BETAS, eps=1e-8, weight_decay=DECAY)

    def program(comm: Comm) -> list[tuple[float, float]]:
        bare = from_huggingface(model)
        plan = hf_cases.plan_of(bare, mesh)
        step = make_train_step(bare.loss(plan, comm, training=False), plan, tx, comm, clip=CLIP)
        state = init_state(bare.load(plan, comm), plan, tx)
        history: list[tuple[float, float]] = []
        for batch in batches:
            state, metrics = step(state, part_of(batch, mesh, comm.rank))
            history.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return history

    found = simulate(program, mesh)
    expected = plain_steps(model, batches)
    for (loss, norm), (plain_loss, plain_norm) in zip(found[0], expected, strict=True):
        assert abs(loss - plain_loss) <= 1e-6
        assert abs(norm - plain_norm) <= 1e-5 * plain_norm
    assert min(norm for _, norm in expected) > CLIP  # clipping was active
    assert found[1:] == found[:1] * 3
