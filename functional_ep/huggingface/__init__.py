"""Any transformers MoE model, without presets: experts follow EP, everything else ZeRO-3."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from functional_ep.huggingface.shift import next_tokens

if TYPE_CHECKING:
    from functional_ep.huggingface.model import Model
    from functional_ep.huggingface.stream import Described
    from sharding import Comm, Plan

OLDEST = (5, 20)


def from_huggingface(source: Any, dtype: torch.dtype | None = None, adapter: Any = None) -> Model:
    """``model(**inputs) = from_huggingface(model).apply(plan, comm)(shards, **inputs)``, any mesh.

    Routed experts are found by the interface that transformers gives them; their rows travel to
    the ranks that hold them. Routers, shared experts, attention, embeddings are untouched. Each
    layer, and each module outside of the layers, is one ``sharded`` unit.

    Args:
        source: a transformers model on any device, with adapters of peft or without; a directory in
            hub layout (weights are read by ``load``, not here); or a config.
        dtype: of the parameters; by default that of a model, and float32 for a directory or a
            config, whatever its files hold: masters are trained in it and written in it.
        adapter: a ``LoraConfig`` of peft, for a fresh adapter beside the weights of the source: in
            float32 where those are narrower, as peft keeps it, else in their dtype.

    Raises:
        ImportError: transformers is absent or too old.
        ValueError: no routed experts, or something that cannot be converted, with its path.
        FileNotFoundError: a directory without a config.

    >>> from transformers import OlmoeConfig, OlmoeForCausalLM
    >>> from sharding import Mesh, expert_parallel, make_plan, simulate, zero3
    >>> config = OlmoeConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_experts=2,
    ...     num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    ...     num_experts_per_tok=1, eos_token_id=1)
    >>> plain, ids = OlmoeForCausalLM(config).eval(), torch.tensor([[2, 3, 4]])
    >>> model, mesh = from_huggingface(plain), Mesh(ep=2)
    >>> rules = {"dense": zero3("ep"), "expert": expert_parallel("ep")}
    >>> plan = make_plan(model.shapes, model.labels, rules, mesh)
    >>> def program(comm):
    ...     return model.apply(plan, comm)(model.load(plan, comm), input_ids=ids).logits
    >>> [torch.allclose(logits, plain(ids).logits) for logits in simulate(program, mesh)]
    [True, True]
    """
    _require_transformers()
    from functional_ep.huggingface.model import (
        model_of,  # transformers is imported when it is needed, and not before
    )

    if isinstance(source, Path):
        source = str(source)
    return model_of(source, dtype, adapter)


def to_huggingface(
    path: str | Path,
    shards: Any,
    plan: Plan,
    comm: Comm,
    model: Described,
    *,
    max_shard_size: int | str = "50GB",
    dtype: torch.dtype | None = None,
) -> None:
    """``from_pretrained(path)`` has the parameters ``plan.full(shards, comm)``: hub layout.

    Names, shapes and files are those of the checkpoint that was loaded, by transformers'
    conversions run backwards; for a model from elsewhere, those of ``save_pretrained``. Of a model
    that carries an adapter of peft it is the adapter alone, for ``PeftModel.from_pretrained``.

    Every rank calls this. Leaves are gathered a few at a time, never more than the largest
    conversion needs. All ranks write: blocks of each file go to the ranks in turn, so ``path`` has
    to be on a file system that all of them share. It appears when it is complete.

    Args:
        path: a directory that does not exist, or is empty.
        shards: of a plan made from ``model.shapes``, such as ``state.params``.
        plan: of the shards.
        comm: the ranks.
        model: from :func:`from_huggingface`. Tokenizer and generation files are copied from a
            source that is a directory.
        max_shard_size: bytes of a file, or text such as ``"5GB"``; larger ones are split.
        dtype: that parameters are written in; by default, each in the one that it is held in.

    Raises:
        FileExistsError: ``path`` exists and is no empty directory.
        ValueError: shards or leaves that are not the plan's or the model's.
        OSError: what cannot be written. All ranks raise alike.

    >>> import tempfile
    >>> from transformers import OlmoeConfig, OlmoeForCausalLM
    >>> from sharding import Mesh, expert_parallel, make_plan, simulate, zero3
    >>> config = OlmoeConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_experts=2,
    ...     num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, eos_token_id=1)
    >>> model = from_huggingface(OlmoeForCausalLM(config))
    >>> rules = {"dense": zero3("ep"), "expert": expert_parallel("ep")}
    >>> plan = make_plan(model.shapes, model.labels, rules, Mesh(ep=2))
    >>> path = Path(tempfile.mkdtemp()) / "trained"
    >>> def program(comm):
    ...     to_huggingface(path, model.load(plan, comm), plan, comm, model)
    >>> _ = simulate(program, plan.mesh)
    >>> sorted(file.name for file in path.iterdir())
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    _require_transformers()
    from functional_ep.huggingface.dump import write

    write(path, shards, plan, comm, model, max_shard_size, dtype)


def _require_transformers() -> None:
    oldest = ".".join(map(str, OLDEST))
    fix = f"pip install 'functional-ep[hf]' (transformers>={oldest},<6)"
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(f"from_huggingface needs transformers, which is absent: {fix}") from None
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if not OLDEST <= numbers < (6,):
        raise ImportError(f"from_huggingface needs another transformers than {found}: {fix}")


__all__ = ["from_huggingface", "next_tokens", "to_huggingface"]
