"""Tiny configs of every MoE model type: defaults that most share, and what the others need."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Set wherever a config class has an argument of that name.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16,
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "d_model": 32,
    "output_dim": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Multi-head latent attention: every head has keys of its own.
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
MROPE: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "mrope_section": [1, 1, 2],
}
GEMMA: dict[str, Any] = {
    "enable_moe_block": True,
    "top_k_experts": 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": VISION | {"model_type": "idefics3_vision"}},
    "axk1": LATENT,
    "axk2": LATENT,
    "beam": {"mlp_layer_types": ["dense", "sparse"], "n_group": 2, "topk_group": 1},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_ocr2": {
        "text_config": {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]}
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {
        "text_config": {"top_k_experts": 2},
        "vision_config": VISION | {"model_type": "gemma4_vision"},
    },
    "doge": {"is_moe": True},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": LATENT, "vision_config": {"num_hidden_layers": 42}},
    "dots3_note_text": LATENT,
    "ernie4_5_moe": {"moe_k": 2},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_k": 2,
            "moe_intermediate_size": [16, 8],
            "head_dim": 8,
            "rope_parameters": MROPE,
        }
    },
    "flint": {"sliding_window": 4, "mlp_only_layers": [0]},
    "gemma4_text": GEMMA,
    "gemma4": {"text_config": GEMMA},
    "glm4_moe_lite": LATENT,
    "glm5_next": {
        "text_config": LATENT
        | {"mlp_layer_types": ["dense", "sparse"]}
        | {"qk_rope_head_dim": 0, "head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4}
    },
    "glm4v_moe": {"text_config": {"rope_parameters": MROPE}},
    "glm_moe_dsa": LATENT,
    "granitemoehybrid": {"mamba_n_heads": 4, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "kimi_linear": LATENT | {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": LATENT
    | {"ffn_hidden_size": 24, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 3},
    "mistral4": LATENT
    | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral_large4": {"text_config": LATENT, "vision_config": VISION | {"model_type": "pixtral"}},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 24},
        "audio_config": {
            "num_hidden_layers": 4,
            "hidden_sizes": [16, 16, 16, 16],
            "depths": [1, 1, 1, 1],
        },
        "vision_config": {"num_hidden_layers": 1, "pos_emb_height": 4, "pos_emb_width": 4},
        "out_hidden_size": 32,
        "projector_hidden_size": 32,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 16,
    },
    "nllb-moe": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
    "qwen3_next": DELTA,
    "qwen3_5_moe": {"text_config": DELTA},
    "qwen3_5_moe_text": DELTA,
    "qwen4_exp": {"text_config": DELTA | INDEXER},
    "qwen4_exp_text": DELTA | INDEXER,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "step3p7": {
        "text_config": {
            "sliding_window": 4,
            "share_expert_dim": 16,
            "mlp_layer_types": ["dense", "sparse"],
        }
    },
    "switch_transformers": {
        "d_model": 32,
        "d_ff": 24,
        "d_kv": 8,
        "num_heads": 4,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 2,  # of a sequence: some of its tokens find no place
    },
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4, "sliding_window": 4}},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}


# Checked by test_T14_huggingface.py; docs/huggingface.md says why others are not.
NAMES = """
afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2 deepseek_v2
deepseek_v3 deepseek_v32 deepseek_v4 dots1 dots3_note_text ernie4_5_moe ernie4_5_vl_moe exaone_moe
flex_olmo flint gemma4 gemma4_text glm4_moe glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa gpt_oss
granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4
inkling_text inkling2 inkling2_text jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4
llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text
mistral4 mistral_large4 mixtral muse_spark nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe
qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp qwen4_exp_text
solar_open step3p7 switch_transformers unlimited_ocr zaya
"""
CONVERTED = tuple(NAMES.split())


def tiny_config(model_type: str, **changed: Any) -> PreTrainedConfig:
    """A config that builds in milliseconds."""
    return _shrunk(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | changed)


def _shrunk(cls: Any, changed: dict[str, Any]) -> PreTrainedConfig:
    """The class with small values; parts of a composite are shrunk as well."""
    names = inspect.signature(cls).parameters
    known = {name: value for name, value in SMALL.items() if name in names}
    parts = {
        name: _shrunk(part, changed.get(name, {}))
        for name, part in cls.sub_configs.items()
        if name in names and hasattr(part, "sub_configs")
    }
    return cls(**known | changed | parts)


AUTOS: tuple[Any, ...] = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that generates text, with random weights."""
    for auto in AUTOS:
        if type(config) in auto._model_mapping:
            return auto.from_config(config, attn_implementation="eager")
    raise ValueError(f"no generating model for {type(config).__name__}")


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Values that give every parameter a gradient: no weight zero, no bias at its default."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=random, dtype=torch.float32)
            p.copy_(0.2 * noise + (p.mean() if p.dim() == 1 else 0.0))
        for name, x in model.named_buffers():
            if name.endswith("tid2eid"):  # which experts a token's hash chooses
                experts = model.config.n_routed_experts
                order = torch.rand(len(x), experts, generator=random).argsort(1)
                x.copy_(order[:, : x.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                x.copy_(0.1 * torch.randn(x.shape, generator=random))
