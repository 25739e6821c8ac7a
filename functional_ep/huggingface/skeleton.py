"""Skeletons: a transformers model whose parameters are on the meta device, and its true buffers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares nothing with the model and holds none of its weights."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=False)
    skeleton = copy.deepcopy(model, memo)
    fresh = _fresh(type(model), model.config, None)
    _make_constant(skeleton, _untrained(fresh), dict(model.named_parameters()))
    return skeleton


def skeleton_from(config: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model that a config describes, as ``from_pretrained`` builds it before it reads weights.

    Raises:
        ValueError: the config names no architecture that transformers has.
    """
    architecture = _architecture(config)
    if architecture.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()  # the language model of a composite one
    model = _fresh(architecture, config, dtype)
    _make_constant(model, _untrained(model), {})
    model.requires_grad_(False)
    return model


def _fresh(architecture: Any, config: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        model = architecture._from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()  # which no_init_weights leaves out as well
    return model


def _untrained(fresh: nn.Module) -> list[str]:
    """Parameters that the class itself excludes from training, such as a router's correction."""
    return [name for name, p in fresh.named_parameters() if not p.requires_grad]


def _make_constant(model: nn.Module, names: list[str], values: dict[str, nn.Parameter]) -> None:
    """Buffers instead: an optimizer would let them decay."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if attribute not in owner._parameters:
            continue  # of a skeleton it is a buffer already
        value = values.get(name, owner._parameters[attribute])
        assert value is not None
        del owner._parameters[attribute]
        owner.register_buffer(attribute, value.detach().clone())


def read_config(directory: Path) -> Any:
    """The config of a directory in hub layout.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory}: no config.json there. from_huggingface takes a directory as "
            "save_pretrained writes it or the hub lays it out"
        )
    return AutoConfig.from_pretrained(directory, local_files_only=True)


def _architecture(config: Any) -> Any:
    named = [name for name in config.architectures or () if hasattr(transformers, name)]
    if named:
        return getattr(transformers, named[0])
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForSeq2SeqLM,
    ):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError(
        f"a config of model_type {config.model_type!r} with architectures={config.architectures}: "
        "transformers has no causal language model for it. Name one in config.architectures, or "
        "pass the model itself"
    )


def true_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every buffer by name, with its value: those on the meta device as ``from_pretrained`` does.

    It leaves them to ``_init_weights``, which computes what no file holds (rotary frequencies);
    what it draws at random for parameters has nowhere to go, and the random stream stays.
    """
    names = [name for name, _ in model.named_buffers()]
    if any(x.is_meta for _, x in model.named_buffers()):
        model = copy.deepcopy(model)
        for module in model.modules():
            module.__dict__.pop("_is_hf_initialized", None)
            for name, x in module._buffers.items():
                if x is not None and x.is_meta:
                    module._buffers[name] = torch.zeros_like(x, device="cpu")
        with torch.random.fork_rng(devices=[]):
            model.initialize_weights()
    buffers = dict(model.named_buffers())
    return {name: buffers[name].detach().clone() for name in names}
