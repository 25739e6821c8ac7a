"""A transformers model in one process, and the same one converted, on a mesh."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import hf_configs
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from functional_ep import from_huggingface
from functional_ep.differentiate import sum_over_ranks
from functional_ep.huggingface.model import Model
from sharding import Comm, Mesh, Plan, expert_parallel, make_plan, zero3
from sharding.walk import Backward

RTOL, NOISE = 1e-5, 1e-8  # of the leaf's largest entry; of the largest gradient of all
SEQUENCES, LENGTH = 5, 8
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


class Result(NamedTuple):
    """What a conversion must not change."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor]


def build(model_type: str, seed: int = 0, **changed: Any) -> Any:
    """A tiny float32 model with eager experts, ready for a comparison."""
    torch.manual_seed(seed)
    model = hf_configs.tiny_model(hf_configs.tiny_config(model_type, **changed)).float().eval()
    model.set_experts_implementation("eager")
    hf_configs.randomise(model, seed)
    return model


def batch_of(model: Any, seed: int = 0, sequences: int = SEQUENCES) -> dict[str, Tensor]:
    """Random tokens, padded at the end to uneven lengths; labels are the tokens that follow."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (sequences, LENGTH), generator=random)
    lengths = torch.randint(2, LENGTH + 1, (sequences, 1), generator=random)
    mask = (torch.arange(LENGTH) < lengths).long()
    follows = F.pad(ids[:, 1:], (0, 1), value=-100)
    follows_mask = F.pad(mask[:, 1:], (0, 1))
    labels = torch.where(follows_mask.bool(), follows, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.flip(0)
    return batch


def part_of(batch: Mapping[str, Tensor], mesh: Mesh, rank: int) -> dict[str, Tensor]:
    """A rank's sequences: as even as they can be, which is not even."""
    cuts = torch.linspace(0, len(batch["labels"]), mesh.size + 1).int().tolist()
    return {name: x[cuts[rank] : cuts[rank + 1]] for name, x in batch.items()}


def reference(model: Any, batch: Mapping[str, Tensor]) -> Result:
    """transformers alone: its own loss (shifted labels) and autograd."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    outputs = model(**inputs, use_cache=False)
    loss = F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
    auxiliary = getattr(outputs, "aux_loss", None)
    if auxiliary is not None:
        loss = loss + model.config.get_text_config().router_aux_loss_coef * auxiliary
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*trained, strict=True)
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    by_name = stacked(dict(zip(names, grads, strict=True)))
    return Result(loss.detach(), outputs.logits.detach(), by_name)


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of experts that are modules of their own as stacks, by the names of a conversion."""
    apart: dict[str, list[Tensor]] = {}
    for name, x in tensors.items():
        apart.setdefault(re.sub(r"\.expert_\d+", "", name), []).append(x)
    return {name: xs[0] if name in tensors else torch.stack(xs) for name, xs in apart.items()}


def plan_of(model: Model, mesh: Mesh) -> Plan:
    return make_plan(model.shapes, model.labels, RULES, mesh)


def converted(
    comm: Comm,
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    backward: Backward = "regather",
    compile: bool = False,
) -> Result:
    """The same from shards, on every rank; the logits are this rank's."""
    bare = from_huggingface(model)
    plan = plan_of(bare, comm.mesh)
    mine = part_of(batch, comm.mesh, comm.rank)
    shards = bare.load(plan, comm)
    leaves = {name: x.requires_grad_() for name, x in shards.items()}
    loss = bare.loss(plan, comm, backward, training=False, compile=compile)
    total, count, _ = loss(leaves, mine)
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    total, count = sum_over_ranks([total.detach(), count], comm)
    whole = plan.full(dict(zip(leaves, grads, strict=True)), comm)
    inputs = {name: x for name, x in mine.items() if name != "labels"}
    with torch.no_grad():
        logits = bare.apply(plan, comm, compile=compile)(shards, **inputs).logits
    return Result(total / count, logits, {name: g / count for name, g in whole.items()})


def converted_type(
    comm: Comm, model_type: str, backward: Backward = "regather", compile: bool = False
) -> Result:
    """On a real rank, which builds the model itself."""
    model = build(model_type)
    return converted(comm, model, batch_of(model), backward, compile)


def differences(found: list[Result], expected: Result) -> Iterator[tuple[str, float]]:
    """Of the loss, the logits and each gradient: the error, divided by the largest entry.

    A gradient that is itself rounding error of the others counts as that.
    """
    noise = NOISE / RTOL * max(float(g.abs().max()) for g in expected.grads.values())
    logits = torch.cat([each.logits for each in found])
    yield "logits", _difference(logits, expected.logits)
    for each in found:
        yield "loss", _difference(each.loss, expected.loss)
        assert each.grads.keys() == expected.grads.keys()
        for name, g in expected.grads.items():
            yield f"gradient of {name}", _difference(each.grads[name], g, noise)


def worst(found: list[Result], expected: Result) -> float:
    """The largest of all differences."""
    return max(error for _, error in differences(found, expected))


def check(found: list[Result], expected: Result, what: str) -> None:
    """No difference is larger than the tolerance."""
    for name, error in differences(found, expected):
        assert error <= RTOL, f"{what}: {name} is off by {error:.3g} of its largest entry"


def _difference(found: Tensor, expected: Tensor, noise: float = 0.0) -> float:
    assert found.shape == expected.shape, f"{found.shape}, expected {expected.shape}"
    if not found.numel():
        return 0.0
    error = float((found - expected).abs().max())
    return error / (float(expected.abs().max()) + noise) if error else 0.0
