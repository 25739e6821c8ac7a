"""transformers' own expert parallelism, with its FSDP2 for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.distributed import DistributedConfig

from peers.model import CLIP, batch_of, mean_loss, optimizer_of, read_model
from peers.shapes import Job
from peers.trainer import Trainer, mean_over_ranks


@contextmanager
def start(job: Job, weights: Path) -> Iterator[Trainer]:
    dist.init_process_group("gloo")
    mixed = job.dtype != "float32"
    config = DistributedConfig(
        fsdp_size=job.ranks, tp_size=1, ep_size=job.ranks, fsdp_mixed_precision=mixed
    )
    model = read_model(weights, distributed_config=config)
    groups = list(_by_mesh(list(model.parameters())).values())
    optimizers = [optimizer_of(group) for group in groups]  # fused ones cannot mix meshes

    def step(i: int) -> float:
        ids, targets = batch_of(job, i, dist.get_rank())
        logits = model(input_ids=ids, use_cache=False).logits
        loss = mean_loss(logits.full_tensor() if isinstance(logits, DTensor) else logits, targets)
        loss.backward()
        _clip(groups)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return mean_over_ranks(loss)

    yield Trainer(step, sum(p.numel() for p in model.parameters()))
    dist.destroy_process_group()


def _by_mesh(params: Sequence[torch.Tensor]) -> dict[Any, list[torch.Tensor]]:
    groups: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for p in params:
        groups[p.device_mesh if isinstance(p, DTensor) else None].append(p)
    return groups


def _clip(groups: Sequence[Sequence[torch.Tensor]]) -> None:
    """By one norm, made of a norm for each mesh, as transformers' Trainer does."""
    norms: list[torch.Tensor] = []
    for group in groups:
        norm = get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        clip_grads_with_norm_(group, CLIP, total)
