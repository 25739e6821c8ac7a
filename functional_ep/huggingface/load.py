"""Weights in: every rank reads its own intervals of a directory, a state dict or a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from functional_ep.huggingface.convert import Target, assemble
from functional_ep.huggingface.lazy import read
from functional_ep.huggingface.names import Module
from functional_ep.huggingface.source import Source, open_source
from sharding import Comm, Plan


def load(skeleton: Any, source: Source, plan: Plan, comm: Comm) -> dict[str, Tensor]:
    """``shard = pad(ravel(x)[lo:hi])`` of every leaf x of a source, read by each rank for itself.

    transformers' conversions say which tensors of the source make which leaf. A rank reads what its
    intervals are made of, so that beyond its shards there are a few megabytes in memory, or one
    leaf's share where a conversion reshapes. Nothing is sent between ranks.

    Args:
        skeleton: the transformers module, on the meta device.
        source: a directory in hub layout (``model.safetensors``, or the files of its index), a
            state dict in the names of either, or a module of the skeleton's class.
        plan: of a flat dict of leaves by the names of ``skeleton.named_parameters()``. Floating
            point is cast to the dtype of the leaf as it is read.
        comm: says which rank this is, and on which device its shards go.

    Raises:
        FileNotFoundError: no directory, no config.json, no weights, a file of the index missing.
        ValueError: a damaged file; pickled weights; a tensor that is missing, left over, of another
            shape or dtype, by name and file; quantised weights; tied weights that differ; a plan of
            another mesh.

    >>> from transformers import OlmoeConfig, OlmoeForCausalLM
    >>> from sharding import Mesh, expert_parallel, make_plan, simulate, zero3
    >>> config = OlmoeConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_experts=2,
    ...     num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    >>> with torch.device("meta"):
    ...     skeleton = OlmoeForCausalLM(config)
    >>> shapes = dict(skeleton.named_parameters())
    >>> labels = {name: "expert" if ".experts." in name else "dense" for name in shapes}
    >>> rules = {"dense": zero3("ep"), "expert": expert_parallel("ep")}
    >>> plan = make_plan(shapes, labels, rules, Mesh(ep=2))
    >>> module = OlmoeForCausalLM(config)
    >>> shards = simulate(lambda comm: load(skeleton, module, plan, comm), plan.mesh)
    >>> name = "model.layers.0.mlp.experts.down_proj"
    >>> torch.equal(shards[1][name], module.get_parameter(name)[1].reshape(-1))
    True
    """
    plan.check_mesh(comm)
    targets = _assembled(skeleton, source)
    by_leaf = _by_leaf(skeleton, targets)
    shards: list[Tensor] = []
    for leaf, layout in zip(plan.leaves, plan.layouts, strict=True):
        if leaf.path not in by_leaf:
            raise ValueError(
                f"{leaf} is no parameter of {type(skeleton).__name__}: the plan has to be made "
                "from the shapes of this model"
            )
        (name, target), *others = by_leaf[leaf.path].items()
        if tuple(target.value.shape) != leaf.shape:
            raise ValueError(f"{leaf} expected, found {tuple(target.value.shape)} for it: {target}")
        lo, hi = layout.interval(comm.rank)
        shard = _shard(target, lo, hi, layout.shard_size, leaf.dtype, comm.device)
        for other, tied in others:
            if not _equal(tied, lo, hi, shard):
                raise ValueError(
                    f"{target} and {tied} differ, but {name} and {other} are tied in the model. "
                    "Set tie_word_embeddings=False in config.json, or remove the wrong one"
                )
        shards.append(shard)
    return plan.unflatten(shards)


def load_buffers(skeleton: Any, source: Source) -> dict[str, Tensor]:
    """``{name: buffer}``: the persistent ones that a source has, whole, on every rank.

    Their dtypes are those of the skeleton's. What a class lets be missing is left out.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    module = Module(skeleton)
    targets = _assembled(skeleton, source)
    return {
        name: read(
            (value := targets[name].value),
            0,
            value.numel(),
            torch.empty(value.numel(), dtype=module.expected[name].dtype),
        ).view(value.shape)
        for name in module.buffers
        if name in targets
    }


def _assembled(skeleton: Any, source: Source) -> dict[str, Target]:
    return assemble(Module(skeleton), open_source(source), hub=not isinstance(source, nn.Module))


def _by_leaf(skeleton: Any, targets: Mapping[str, Target]) -> dict[str, dict[str, Target]]:
    """Each parameter by its first name: what the source has for its names, its first one first."""
    by_leaf: dict[str, dict[str, Target]] = {}
    for name, first in Module(skeleton).first_name.items():
        if name in targets:
            by_leaf.setdefault(first, {})[name] = targets[name]
    return by_leaf


def _shard(
    target: Target, lo: int, hi: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    shard = torch.empty(size, dtype=dtype)
    read(target.value, lo, hi, shard[: hi - lo])
    shard[hi - lo :] = 0
    return shard.to(device)


def _equal(tied: Target, lo: int, hi: int, shard: Tensor) -> bool:
    return torch.equal(read(tied.value, lo, hi).to(shard), shard[: hi - lo])
