"""Tiny models of many families, saved by transformers itself, and what a plan needs of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hf_configs import SMALL
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from functional_ep.huggingface.load import load_buffers
from sharding import Comm, Mesh, Plan, Rule, expert_parallel, make_plan, zero3
from sharding.comm import Op, Work
from sharding.testing import axes_of, meshes

logging.disable_progress_bar()
logging.set_verbosity_error()

SIZES = {
    **SMALL,
    "vocab_size": 96,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "n_group": 2,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MANY = 12  # experts: number 10 comes before number 2 in the alphabet
CHOSEN: dict[str, dict[str, Any]] = {
    "mixtral": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": MANY, "num_local_experts": MANY},
    "qwen2_moe": {},
    "olmoe": {},
    "gpt_oss": {},
    "glm4_moe": {},
    "deepseek_v3": {},
    "deepseek_v4": {},
    "granitemoe": {"tie_word_embeddings": True},
    "phimoe": {},
    "minimax_m2": {},
    "ernie4_5_moe": {},
    "jamba": {"tie_word_embeddings": True},
    "inkling2_text": {"unpadded_vocab_size": 90},
    "llama4_text": {},
    "qwen3_next": {},
    "longcat_flash": {},
    "nemotron_h": {},
}
# An older transformers knows fewer.
FAMILIES = {family: sizes for family, sizes in CHOSEN.items() if family in CONFIG_MAPPING}


class Model(NamedTuple):
    """What writing needs of a converted model, and the plain one to compare with."""

    skeleton: Any
    config: Any
    shapes: dict[str, Tensor]
    labels: dict[str, str]
    buffers: dict[str, Tensor]
    source: Any
    plain: dict[str, Tensor]


def config_of(family: str, **more: Any) -> Any:
    default = AutoConfig.for_model(family)
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name)}
    return AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **more})


def random_model(config: Any) -> Any:
    """A module in which no two parameters, and no two rows of one, are alike."""
    module = AutoModelForCausalLM.from_config(config)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream))
        for name, buffer in module.named_buffers():
            if name in module.state_dict() and buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=stream))
    return module


def skeleton_of(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def described(config: Any, source: Any, plain: dict[str, Tensor]) -> Model:
    skeleton = skeleton_of(config)
    shapes = dict(skeleton.named_parameters())
    labels = {name: "expert" if ".experts." in name else "dense" for name in shapes}
    return Model(skeleton, config, shapes, labels, load_buffers(skeleton, source), source, plain)


class Alone(Comm):
    """The only rank there is."""

    def __init__(self) -> None:
        super().__init__(Mesh(edp=1, ep=1), 0)

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        raise NotImplementedError("there is nobody to send to")


class Hub:
    """Directories of the families' models, saved once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)

    def _model(self, family: str, max_shard_size: str = "50GB", dtype: str = "float32") -> Model:
        """A model of the family, its directory, and what transformers loads from there."""
        path = self.root / f"{family}-{max_shard_size}-{dtype}"
        config = config_of(family)
        random_model(config).to(getattr(torch, dtype)).save_pretrained(
            path, max_shard_size=max_shard_size
        )
        loaded = AutoModelForCausalLM.from_pretrained(path)
        return described(config, path, loaded.state_dict())


RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


def plan_of(model: Model, mesh: Mesh, rules: dict[str, Rule] = RULES, dtype: Any = None) -> Plan:
    used = {label: rules[label] for label in set(model.labels.values())}
    shapes = {name: x.to(dtype or x.dtype) for name, x in model.shapes.items()}
    return make_plan(shapes, model.labels, used, mesh)


@st.composite
def rules_and_meshes(draw: st.DrawFn, experts: int = 4) -> tuple[dict[str, Rule], Mesh]:
    """Any mesh of up to eight ranks, and any rules on it under which experts divide."""
    mesh = draw(meshes(max_ranks=8))
    split = draw(axes_of(mesh))
    fits = [k for k in range(len(split) + 1) if experts % mesh.count(split[:k]) == 0]
    k = draw(st.sampled_from(fits))
    return {"dense": Rule(store=draw(axes_of(mesh))), "expert": Rule(split[:k], split[k:])}, mesh
