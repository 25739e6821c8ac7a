"""Low-rank adapters of routed experts, as peft attaches them to stacked parameters.

peft adds ``s B_e A_e`` to each expert's matrix. Here the rows take the thin way round, so that the
sum is never made: ``y_e = x_e W_e^T + s (x_e A_e^T) B_e^T``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from functional_ep.grouped import grouped_mm
from functional_ep.huggingface.experts import DECORATED, Kind, Place, decorated
from functional_ep.huggingface.lazy import Lazy


def _wrappers(module: Any) -> Iterator[tuple[str, Any]]:
    """Each wrapper, from the outside in, and then the experts; each with its path from here."""
    path = ""
    while is_wrapper(module):
        yield path, module
        module, path = module.base_layer, f"{path}base_layer."
    yield path, module


def is_wrapper(module: nn.Module) -> bool:
    """Whether peft has wrapped a module for the sake of one of its parameters."""
    return type(module).__name__ == "ParamWrapper"


def _experts(module: nn.Module) -> tuple[str, nn.Module]:
    *_, (path, innermost) = _wrappers(module)
    return path, innermost


def _matches(module: nn.Module) -> bool:
    return is_wrapper(module) and DECORATED.matches(_experts(module)[1])


def refused_adapter(module: Any) -> str | None:
    """Why an adapter cannot be converted, if it cannot."""
    if not is_wrapper(module) or _matches(module):
        return None
    return (
        f"peft adapts the parameter {module.parameter_name!r}, which is no stack of routed "
        "experts: adapt the module instead, by target_modules"
    )


def _stacked(module: nn.Module) -> Sequence[str]:
    """The experts' matrices, and every A: peft lays its rows out expert by expert, those of B not.

    So B is dense: each rank gathers it and takes the columns of its experts.
    """
    *wrappers, (path, experts) = _wrappers(module)
    names = [path + name for name in DECORATED.stacked(experts)]
    return names + [f"{at}lora_A.{a}.weight" for at, wrapper in wrappers for a in wrapper.lora_A]


def _forward(module: nn.Module, place: Place) -> Callable[..., Tensor]:
    *wrappers, (_, experts) = _wrappers(module)
    by_name: dict[str, list[Any]] = {}
    for _, wrapper in wrappers:
        by_name.setdefault(wrapper.parameter_name, []).append(wrapper)

    def added(name: str, rows: Tensor, counts: tuple[int, ...]) -> Iterator[Tensor]:
        for wrapper in by_name.get(name, ()):
            if wrapper.disable_adapters or wrapper.merged:
                continue
            for adapter in wrapper.active_adapters:
                if adapter in wrapper.lora_A:
                    yield _thin(wrapper, adapter, place, rows, counts)

    return decorated(experts, place, added)


def _thin(
    wrapper: Any, adapter: str, place: Place, rows: Tensor, counts: tuple[int, ...]
) -> Tensor:
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    a_erI = a.view(place.local, -1, a.shape[-1])
    b_OrE = b.view(b.shape[0], -1, place.experts)
    b_eOr = b_OrE[..., place.first : place.first + place.local].permute(2, 0, 1)
    inner = grouped_mm(rows.to(a.dtype), a_erI, counts)
    return wrapper.scaling[adapter] * grouped_mm(inner, b_eOr, counts)


LORA = Kind(
    "lora",
    _matches,
    _stacked,
    lambda module: DECORATED.experts(_experts(module)[1]),
    _forward,
)


def adapter_of(skeleton: Any) -> str | None:
    """The name of the adapter that a model carries, if it carries one.

    Raises:
        ValueError: more than one, or whole modules that peft would save with it.
    """
    names = list(getattr(skeleton, "peft_config", {}))
    if len(names) > 1:
        raise ValueError(f"the model carries the adapters {names}; one can be written: delete some")
    whole = [name for name, _ in skeleton.named_parameters() if ".modules_to_save." in name]
    if names and whole:
        raise ValueError(f"{whole[0]}: modules_to_save of peft are not written; leave them out")
    return names[0] if names else None


def adapter_tensors(adapter: str, leaves: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """What peft keeps in a file of its own, by the names that it gives it there.

    >>> import torch
    >>> names = ["q_proj.base_layer.weight", "q_proj.lora_A.default.weight"]
    >>> list(adapter_tensors("default", dict.fromkeys(names, Lazy.of(torch.ones(1)))))
    ['base_model.model.q_proj.lora_A.weight']
    """
    return {
        f"base_model.model.{name.replace(f'.{adapter}.', '.')}": x
        for name, x in leaves.items()
        if ".lora_" in name
    }
