"""FSDP2 on the transformers model, layer by layer; experts are sharded like all else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from peers.model import CLIP, batch_of, mean_loss, optimizer_of, read_model
from peers.shapes import Job
from peers.trainer import Trainer, dtype_of, mean_over_ranks


@contextmanager
def start(job: Job, weights: Path) -> Iterator[Trainer]:
    dist.init_process_group("gloo")
    model = read_model(weights)
    parameters = sum(p.numel() for p in model.parameters())
    _shard(model, job)
    optimizer = optimizer_of(model.parameters())

    def step(i: int) -> float:
        ids, targets = batch_of(job, i, dist.get_rank())
        loss = mean_loss(model(input_ids=ids, use_cache=False).logits, targets)
        loss.backward()  # averages over ranks, whose batches are equally long
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return mean_over_ranks(loss)

    yield Trainer(step, parameters)
    dist.destroy_process_group()


def _shard(model: Any, job: Job) -> None:
    mesh = init_device_mesh("cpu", (job.ranks,))
    policy = MixedPrecisionPolicy()
    if job.dtype != "float32":
        policy = MixedPrecisionPolicy(param_dtype=dtype_of(job), reduce_dtype=torch.float32)
    for part in (*model.model.layers, model.model.embed_tokens):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    last = [model.model.norm, model.lm_head]
    fully_shard(last, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
