"""Detection: which modules are routed experts, and which models cannot be converted."""

from __future__ import annotations

from torch import nn

from functional_ep.huggingface.adapters import ADAPTERS, refusal
from functional_ep.huggingface.experts import DECORATED, UNDECORATED, Kind
from functional_ep.huggingface.lora import LORA, refused_adapter
from functional_ep.huggingface.stacks import are_apart

KINDS = (*ADAPTERS, LORA, DECORATED, UNDECORATED)


def is_routed(module: nn.Module) -> bool:
    """Whether a module holds routed experts, convertible or not."""
    convertible = are_apart(module) or any(kind.matches(module) for kind in KINDS)
    return convertible or refusal(module) is not None


def find_routed(model: nn.Module) -> dict[str, Kind]:
    """``{path: kind}`` of every module of routed experts.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, Kind] = {}
    inside: set[nn.Module] = set()  # of what has been found, and is not found again
    for path, module in model.named_modules():
        if module in inside:
            continue
        kind = next((kind for kind in KINDS if kind.matches(module)), None)
        if kind is not None:
            found[path] = kind
            inside.update(module.modules())
    if not found:
        raise ValueError(
            f"no routed experts found: {type(model).__name__} has no module that went through "
            "transformers' use_experts_implementation, and none with stacked matrices whose "
            "forward takes (hidden_states, top_k_index, top_k_weights). A dense model needs no "
            "expert parallelism"
        )
    return found


def check_supported(model: nn.Module) -> None:
    """Refuse what would be converted into something else.

    Raises:
        ValueError: with the module's path and the reason.
    """
    for path, module in model.named_modules():
        reason = refusal(module) or refused_adapter(module)
        if reason is not None:
            raise ValueError(f"{path} ({type(module).__name__}) cannot be converted: {reason}")
        if getattr(module, "gradient_checkpointing", False) is True:
            raise ValueError(
                f"{path or 'the model'}: gradient checkpointing is on, which would compute layers "
                "again inside of the passes here. Turn it off "
                "(model.gradient_checkpointing_disable()) and use backward='recompute'"
            )
