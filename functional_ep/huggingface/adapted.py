"""Adapters that a model is given here: fresh ones on a skeleton, beside weights that are read."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from functional_ep.huggingface.load import load
from functional_ep.huggingface.source import Source
from sharding import Comm, Leaf, Plan, partition

ADAPTER = "default"  # what peft calls it
KNOWN = re.compile(r"\.lora_[AB]\.default\.weight$")
ELSEWHERE = "Attach others to a model with get_peft_model, and pass that model to from_huggingface"


def with_adapter(skeleton: Any, config: Any) -> Any:
    """A copy of the skeleton with peft's adapter of this config, on the meta device as well.

    An adapter has the dtype of the weights that it is beside, and at least float32.

    Raises:
        ImportError: peft is absent.
        TypeError: another config than a ``LoraConfig``.
        ValueError: adapters that begin with something else than ``A`` and ``B``, or with weights,
            which no rank holds.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise ImportError("an adapter needs peft: pip install 'functional-ep[lora]'") from None
    if not isinstance(config, LoraConfig):
        raise TypeError(f"adapter={config!r}: a LoraConfig of peft is needed. {ELSEWHERE}")
    if config.init_lora_weights is not True:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} needs whole weights. {ELSEWHERE}"
        )
    adapted: Any = inject_adapter_in_model(
        config, copy.deepcopy(skeleton), ADAPTER, low_cpu_mem_usage=True
    )
    base = dict(skeleton.named_parameters())
    for name, _ in adapted.named_parameters():
        if _before(name) not in base and not KNOWN.search(name):
            raise ValueError(f"{name}: only lora_A and lora_B can begin here. {ELSEWHERE}")
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            beside = next(layer.get_base_layer().parameters()).dtype
            for added in (layer.lora_A, layer.lora_B):
                added.to(torch.promote_types(beside, torch.float32))  # as get_peft_model does
    return adapted


def load_with_adapter(base: Any, source: Source, plan: Plan, comm: Comm) -> dict[str, Tensor]:
    """Shards of the base from its source, and of the adapter as peft begins: ``s B A = 0``.

    A is uniform in ``+-1/sqrt(in)``, a function of its name: the same on every mesh.

    Args:
        base: the skeleton before it was given the adapter.
        source: what has its weights.
        plan: of the skeleton with the adapter.
        comm: the ranks.
    """
    own = {leaf.path: _before(leaf.path) for leaf in plan.leaves if not _is_added(leaf.path)}
    of_base = {name: replace(plan.tree[path], path=name) for path, name in own.items()}
    read = load(base, source, plan.at(of_base), comm)
    shards = {path: read[name] for path, name in own.items()}
    for leaf in plan.leaves:
        if leaf.path not in shards:
            rule = plan.rules[leaf.label]
            whole = _begin(leaf).to(comm.device)
            shards[leaf.path] = partition(rule, plan.mesh, comm.rank, whole)
    return shards


def _is_added(path: str) -> bool:
    return ".lora_" in path


def _before(path: str) -> str:
    """A parameter's name before peft wrapped its module."""
    return path.replace(".base_layer", "")


def _begin(leaf: Leaf) -> Tensor:
    if ".lora_A." not in leaf.path:
        return torch.zeros(leaf.shape, dtype=leaf.dtype)
    digest = blake2b(leaf.path.encode(), digest_size=7).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    most = leaf.shape[-1] ** -0.5
    return ((torch.rand(leaf.shape, generator=random) * 2 - 1) * most).to(leaf.dtype)
