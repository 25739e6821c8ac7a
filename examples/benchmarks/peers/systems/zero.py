"""DeepSpeed on the transformers model: ZeRO, with its AutoEP or without."""
# It pins another transformers, so it lives in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils import logger

from peers.model import BETAS, CLIP, DECAY, EPS, RATE, batch_of, mean_loss, read_model
from peers.shapes import Job
from peers.trainer import Trainer, dtype_of, mean_over_ranks


@contextmanager
def start(job: Job, weights: Path, stage: int, ep: int) -> Iterator[Trainer]:
    logger.setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="gloo")
    model = read_model(weights).to(dtype_of(job))
    parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=_config(job, stage, ep))

    def step(i: int) -> float:
        ids, targets = batch_of(job, i, dist.get_rank())
        loss = mean_loss(engine(input_ids=ids, use_cache=False).logits, targets)
        engine.backward(loss)  # averages over ranks, clips and steps by its config
        engine.step()
        return mean_over_ranks(loss)

    yield Trainer(step, parameters)
    engine.destroy()
    dist.destroy_process_group()


def _config(job: Job, stage: int, ep: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "reduce_scatter": True}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    adamw = {
        "lr": RATE,
        "betas": BETAS,
        "eps": EPS,
        "weight_decay": DECAY,
        "torch_adam": True,
        "fused": True,
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.sequences,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": job.dtype == "bfloat16"},
    }
    if ep:
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": ep,
            "preset_model": "qwen3_moe",
            "use_grouped_mm": True,
        }
    return config
