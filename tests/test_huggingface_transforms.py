"""A converted model under transforms, and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_leaves_close
from hf_cases import batch_of, build, converted, part_of, plan_of
from torch import Tensor

from functional_ep import from_huggingface
from sharding import Comm, Mesh, captured, simulate
from sharding.walk import Backward

MESH = Mesh(edp=1, ep=2)
Loss = Callable[[dict[str, Tensor]], Tensor]


def transformed(
    model_type: str, backward: Backward, transform: Callable[[Loss, Any], Any]
) -> list[dict[str, Tensor]]:
    """Of the first call of a loss: nothing that a transform leaves may stay in the model."""
    model = build(model_type).double()
    batch = batch_of(model)

    def program(comm: Comm) -> dict[str, Tensor]:
        bare, mine = from_huggingface(model), part_of(batch, comm.mesh, comm.rank)
        plan = plan_of(bare, comm.mesh)
        loss, shards = bare.loss(plan, comm, backward, training=False), bare.load(plan, comm)
        found = transform(lambda p: loss(p, mine)[0], shards)
        plain = {name: x.clone().requires_grad_() for name, x in shards.items()}
        assert loss(plain, mine)[0].grad_fn is not None, "the model has kept a wrapper"
        return plan.full(found, comm)

    return simulate(program, MESH)


def reverse(loss: Loss, shards: Any) -> Any:
    return torch.func.grad(loss)(shards)


def forward_over_reverse(loss: Loss, shards: Any) -> Any:
    return torch.func.jvp(torch.func.grad(loss), (shards,), (shards,))[1]


@pytest.mark.parametrize("transform", [reverse, forward_over_reverse])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_transforms_are_the_same_in_every_mode(
    model_type: str, transform: Callable[[Loss, Any], Any]
) -> None:
    """To the rounding of the float32 in which transformers' norms and routers compute."""
    kept = transformed(model_type, "keep", transform)[0]
    others: tuple[Backward, ...] = ("regather", "recompute")
    for backward in others:
        found = transformed(model_type, backward, transform)[0]
        assert_leaves_close(found, kept, backward, rtol=1e-6)


def test_reverse_mode_is_autograd() -> None:
    model = build("mixtral")
    batch = batch_of(model)
    expected = simulate(lambda comm: converted(comm, model, batch, "recompute"), MESH)[0]
    count = float((batch["labels"] != -100).sum())
    found = transformed("mixtral", "recompute", reverse)[0]
    means = {name: (g / count).float() for name, g in found.items()}
    assert_leaves_close(means, expected.grads, "recompute", rtol=1e-5)


def test_lanes_that_would_route_differently_are_refused() -> None:
    def lanes(loss: Loss, shards: Any) -> Any:
        return torch.vmap(loss)({name: torch.stack([x, 1.1 * x]) for name, x in shards.items()})

    with pytest.raises(ValueError, match=r"vmap over a converted model: .*once for each lane"):
        transformed("mixtral", "regather", lanes)


@pytest.mark.parametrize("model_type", ["llama4_text", "gpt_oss", "deepseek_v3"])
def test_computing_again_changes_no_bit(model_type: str) -> None:
    """Also where a model reads a parameter of another part, as Llama 4 does for its device."""
    model = build(model_type)
    batch = batch_of(model)
    modes: tuple[Backward, ...] = ("regather", "recompute")
    kept, again = (
        simulate(lambda comm, mode: converted(comm, model, batch, mode), MESH, [mode] * 2)[0].grads
        for mode in modes
    )
    assert all(torch.equal(again[name], g) for name, g in kept.items())


def test_what_a_layer_captures_is_not_looked_for_in_the_whole_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each layer's time would grow with their number."""
    looked = [0]
    look: Any = vars(captured)["_captured"]

    def counting(*args: Any) -> Any:
        looked[0] += 1
        return look(*args)

    monkeypatch.setattr(captured, "_captured", counting)
    found: list[int] = []
    for layers in (2, 4):
        model = build("mixtral", num_hidden_layers=layers)
        batch, before = batch_of(model), looked[0]
        simulate(lambda comm, m=model, b=batch: converted(comm, m, b, "recompute"), MESH)
        found.append(looked[0] - before)
    assert 0 < found[1] <= 2 * found[0]
