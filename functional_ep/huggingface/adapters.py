"""Adapters: families that break the contract of transformers' experts, each in a few lines.

Known by the names of their classes, since they have no interface to be known by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from functional_ep.grouped import grouped_mm
from functional_ep.huggingface.experts import Kind, Place, own_forward
from functional_ep.huggingface.stacks import Stack, count_modules, stacked_names


def _called(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module).__name__ == name


def _dbrx(module: Any, place: Place) -> Callable[..., Tensor]:
    """Matrices of all experts below one another, cut up by the class's own forward."""
    return own_forward(module, place)


def _jetmoe(module: Any, place: Place) -> Callable[..., Tensor]:
    """One product of a mixture, for rows that are sorted by expert: two of them are an expert."""

    def forward(inputs: Tensor, expert_size: list[int]) -> Tensor:
        numbers = torch.tensor(expert_size, device=inputs.device)
        ids = torch.arange(place.experts, device=inputs.device)
        ids_R1 = torch.repeat_interleave(ids, numbers, output_size=len(inputs))[:, None]
        return place.visit(inputs, ids_R1, lambda x, n: grouped_mm(x, module.weight, n))[:, 0]

    return forward


def _llama4(module: Any, place: Place) -> Callable[..., tuple[Tensor, Tensor]]:
    """Scores multiply before the experts, which get every token and a zero for most of them."""

    def local(rows_RD: Tensor, counts_e: tuple[int, ...]) -> Tensor:
        experts = module.experts
        gate, up = grouped_mm(rows_RD, experts.gate_up_proj.mT, counts_e).chunk(2, -1)
        return grouped_mm(up * experts.act_fn(gate), experts.down_proj.mT, counts_e)

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, module.hidden_dim)
        scores_TE, logits_TE = module.router(x_TD)
        ids_TK = logits_TE.topk(module.top_k, dim=1).indices
        place.chosen(ids_TK)
        rows_TKD = x_TD[:, None] * scores_TE.gather(1, ids_TK)[..., None]
        back = place.visit(rows_TKD.flatten(0, 1), ids_TK.reshape(-1, 1), local)
        return module.shared_expert(x_TD) + back.view(rows_TKD.shape).sum(1), logits_TE

    return forward


def _longcat(module: Any, place: Place) -> Callable[..., Tensor]:
    """Some experts are the identity, which needs no travel.

    ``gate_up_proj`` has rows for them too, so that its rows are not split as the others are: it is
    dense, and each rank takes its part of it.
    """

    def local(rows_RD: Tensor, counts_e: tuple[int, ...]) -> Tensor:
        gate_up = module.gate_up_proj[place.first : place.first + place.local]
        gate, up = grouped_mm(rows_RD, gate_up, counts_e).chunk(2, -1)
        return grouped_mm(module.act_fn(gate) * up, module.down_proj, counts_e)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        token, choice = torch.where(top_k_index < place.experts)
        ids_R1 = top_k_index[token, choice][:, None]
        computed = place.visit(hidden_states[token], ids_R1, local)[:, 0]
        same = hidden_states[:, None].expand(*top_k_index.shape, -1)
        rows_TKD = same.index_put((token, choice), computed)
        return (rows_TKD * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    return forward


def _switch(module: Any, place: Place) -> Callable[..., Tensor]:
    """One expert per token, or none: its own sequence may have filled the expert before it."""

    def local(rows_RD: Tensor, counts_e: tuple[int, ...]) -> Tensor:
        h = module.dropout(module.act(grouped_mm(rows_RD, module.wi.weight, counts_e)))
        return grouped_mm(h.to(module.wo.weight.dtype), module.wo.weight, counts_e)

    def forward(hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        is_kept, ids_T = selected_experts[:, 0].max(-1)
        place.chosen(torch.where(is_kept.bool(), ids_T, place.experts)[:, None])
        (token,) = torch.where(is_kept)
        rows = place.visit(hidden_states[token], ids_T[token][:, None], local)[:, 0]
        rows = (rows * routing_weights[token]).to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_put((token,), rows)

    return forward


ADAPTERS: tuple[Kind, ...] = (
    Kind(
        "dbrx",
        _called("DbrxExperts"),
        lambda module: ("mlp.w1", "mlp.v1", "mlp.w2"),
        lambda module: int(module.num_experts),
        _dbrx,
    ),
    Kind(
        "jetmoe",
        _called("JetMoeParallelExperts"),
        lambda module: ("weight",),
        lambda module: int(module.num_experts),
        _jetmoe,
    ),
    Kind(
        "llama4",
        _called("Llama4TextMoe"),
        lambda module: ("experts.gate_up_proj", "experts.down_proj"),
        lambda module: int(module.num_experts),
        _llama4,
    ),
    Kind(
        "longcat_flash",
        _called("LongcatFlashExperts"),
        lambda module: ("down_proj",),
        lambda module: int(module.num_routed_experts),
        _longcat,
    ),
    Kind(
        "switch_transformers",
        lambda module: isinstance(module, Stack),
        stacked_names,
        count_modules,
        _switch,
    ),
)


def _ernie_vl(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Text and vision tokens have experts of their own; a rank without the one still takes part."""

    def mixed(moe: Any, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        y, logits = moe(x_TD)  # which flattens them
        return y.view(x_TD.shape), logits.view(len(x_TD), module.num_experts)

    def forward(
        hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x_TD = hidden_states.flatten(0, 1)
        if moe_mm_token_type_ids is None:
            y_TD, logits_TE = mixed(module.text_moe, x_TD)
        else:
            is_vision = moe_mm_token_type_ids.bool().flatten()
            text, a = mixed(module.text_moe, x_TD[~is_vision])
            vision, b = mixed(module.vision_moe, x_TD[is_vision])
            order = torch.cat([torch.where(~is_vision)[0], torch.where(is_vision)[0]])
            back = order.argsort()
            y_TD, logits_TE = torch.cat([text, vision])[back], torch.cat([a, b])[back]
        y = y_TD.view(hidden_states.shape)
        if module.shared_experts is not None:
            y = y + module.shared_experts(hidden_states)
        return y, logits_TE

    return forward


def _switch_router(module: Any) -> Callable[..., Any]:
    """It computes in its own dtype; its parameters keep theirs, which it would cast in place."""
    classifier = module.classifier
    classifier.to = lambda dtype: classifier

    def project(x: Tensor) -> Tensor:
        bias = None if classifier.bias is None else classifier.bias.to(x.dtype)
        return torch.nn.functional.linear(x, classifier.weight.to(x.dtype), bias)

    classifier.forward = project
    return module.forward


# Blocks that call their experts on some ranks and not on others, or change their own parameters.
BLOCKS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "Ernie4_5_VLMoeMoeBlock": _ernie_vl,
    "SwitchTransformersTop1Router": _switch_router,
}

REFUSED = {
    "DogeCDMoE": "its router mixes the logits of different tokens, so that a token's output "
    "depends on which others are on its rank",
    "NllbMoeExperts": "its capacity counts the tokens of the whole batch, so that a token's output "
    "depends on which others are on its rank",
}


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be converted, if it cannot."""
    return REFUSED.get(type(module).__name__)
