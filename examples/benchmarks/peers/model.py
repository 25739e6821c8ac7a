"""The model, its seeded weights, the batches and the optimizer: what every system is given."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

from peers.shapes import Job

# At a higher rate Adam makes differences out of rounding, which then decide near ties of a router.
RATE, DECAY, BETAS, EPS, CLIP = 3e-5, 0.1, (0.9, 0.95), 1e-8, 1.0


def config_of(job: Job) -> Qwen3MoeConfig:
    shape = job.shape
    fields: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "moe_intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": max(job.length, 256),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen3MoeConfig(**fields)


def write_weights(job: Job, directory: Path) -> None:
    """A checkpoint that all systems start from."""
    disable_progress_bar()
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config_of(job)).save_pretrained(directory)


def read_model(directory: Path, **options: Any) -> Any:
    """The transformers model, float32, as its users train it on CPU."""
    chosen: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "sdpa",
        "experts_implementation": "grouped_mm",
    }
    return Qwen3MoeForCausalLM.from_pretrained(directory, **chosen | options).train()


def batch_of(job: Job, step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and those that follow them: few are frequent, and every odd one can be foreseen."""
    random = torch.Generator().manual_seed(7919 * step + rank)
    vocab = job.shape.vocab
    uniform = torch.rand(job.sequences, job.length + 1, generator=random)
    tokens = (vocab**uniform - 1).long().clamp(0, vocab - 1)
    odd = tokens[:, 1::2]
    odd.copy_((tokens[:, 0 : 2 * odd.shape[1] : 2] * 31 + 7) % vocab)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def optimizer_of(params: Iterable[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(params), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )
