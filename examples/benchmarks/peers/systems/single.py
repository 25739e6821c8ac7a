"""Plain transformers in one process that trains the batches of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from peers.model import CLIP, batch_of, mean_loss, optimizer_of, read_model
from peers.shapes import Job
from peers.trainer import Trainer, dtype_of


@contextmanager
def start(job: Job, weights: Path, compile: bool = False) -> Iterator[Trainer]:
    model = read_model(weights)
    if compile:
        model.compile()
    masters = list(model.parameters())
    if job.dtype != "float32":
        masters = [p.detach().clone().requires_grad_() for p in masters]
        model.to(dtype_of(job))
    optimizer = optimizer_of(masters)

    def step(i: int) -> float:
        whole = [batch_of(job, i, r) for r in range(job.ranks)]
        ids, targets = map(torch.cat, zip(*whole, strict=True))
        loss = mean_loss(model(input_ids=ids, use_cache=False).logits, targets)
        loss.backward()
        if job.dtype != "float32":
            _hand_over(model, masters)
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if job.dtype != "float32":
            torch._foreach_copy_([p.detach() for p in model.parameters()], masters)
        return loss.item()

    yield Trainer(step, sum(p.numel() for p in masters))


def _hand_over(model: Any, masters: list[torch.Tensor]) -> None:
    """Gradients go to the float32 masters."""
    for master, p in zip(masters, model.parameters(), strict=True):
        master.grad, p.grad = p.grad.float(), None
