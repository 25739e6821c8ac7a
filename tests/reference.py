"""Training in one process, in plain torch: what every mesh must reproduce.

Written from the definitions, with none of the library's functions: dense experts in loops over
tokens, autograd, torch.optim, clip_grad_norm_, the mean over the global batch taken at the end.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_ep.testing import EPS, Batch, Chosen, Training


class Step(NamedTuple):
    loss: Tensor
    norm: Tensor
    grads: dict[str, Tensor]  # of the mean, before clipping, of what is not frozen
    params: dict[str, Tensor]


def train(case: Training) -> list[Step]:
    """Loss, norm, gradient and parameters of every step."""
    params = {
        path: x.clone().requires_grad_(label_of(path) in case.optimizers)
        for path, x in named(case.params()).items()
    }
    trained = {path: x for path, x in params.items() if x.requires_grad}
    optimizers = {
        label: optimizer(chosen, [x for path, x in params.items() if label_of(path) == label])
        for label, chosen in case.optimizers.items()
    }
    steps: list[Step] = []
    for number in range(len(case.sizes)):
        micros = [
            [case.batch(number, micro, rank) for rank in case.mesh]
            for micro in range(len(case.sizes[number]))
        ]
        labels = sum(int((b["labels"] != -100).sum()) for batch in micros for b in batch)
        total = torch.stack([objective(case, params, batch) for batch in micros]).sum()
        total = total / max(labels, 1)
        grads = torch.autograd.grad(total, list(trained.values()), materialize_grads=True)
        for x, g in zip(trained.values(), grads, strict=True):
            x.grad = g.clone()
        limit = math.inf if case.clip is None else case.clip
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), limit)
        for label, each in optimizers.items():
            for group in each.param_groups:
                group["lr"] = rate(case.optimizers[label], number)
            each.step()
        now = {path: x.detach().clone() for path, x in params.items()}
        steps.append(Step(total.detach(), norm, dict(zip(trained, grads, strict=True)), now))
    return steps


def objective(case: Training, params: dict[str, Tensor], batches: list[Batch]) -> Tensor:
    """Sum of cross-entropies, and auxiliary means times the number of labels, over all ranks."""
    cfg = case.cfg
    seen: list[tuple[list[Tensor], Tensor]] = []
    total = torch.zeros((), dtype=torch.float64)
    labels = 0
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for ids, targets, valid in zip(batch["input_ids"], batch["labels"], mask, strict=True):
            logits, routers = forward(case, params, ids, valid)
            wanted = targets != -100
            total = total + F.cross_entropy(logits[wanted], targets[wanted], reduction="sum")
            labels += int(wanted.sum())
            seen.append((routers, valid))
    tokens = sum(int(valid.sum()) for _, valid in seen)
    if not tokens:
        return total
    for layer in range(cfg.layers):
        logits = torch.cat([routers[layer][valid] for routers, valid in seen])
        probs = logits.softmax(-1)
        chosen = probs.topk(cfg.top_k).indices
        f = F.one_hot(chosen.flatten(), cfg.experts).to(probs.dtype).mean(0)
        total = total + labels * cfg.balance * cfg.experts * (f * probs.mean(0)).sum()
        total = total + labels * cfg.z * logits.logsumexp(-1).square().mean()
    return total


def forward(
    case: Training, params: dict[str, Tensor], ids: Tensor, valid: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Logits of one sequence, and each layer's router logits."""
    cfg = case.cfg
    x = params["embed"][ids]
    routers: list[Tensor] = []
    for layer in range(cfg.layers):
        w = {path.split("/", 2)[2]: p for path, p in params.items() if f"blocks/{layer}/" in path}
        x = x + attend(case, w, norm(x, w["norm1"]), valid)
        h = norm(x, w["norm2"])
        routers.append(h @ w["router"].T)
        x = x + torch.stack(
            [mix(case, w, h_t, r_t) for h_t, r_t in zip(h, routers[-1], strict=True)]
        )
    head = params["embed" if cfg.tied else "head"]
    return norm(x, params["norm"]) @ head.T, routers


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def mix(case: Training, w: dict[str, Tensor], x: Tensor, logits: Tensor) -> Tensor:
    scores, chosen = logits.softmax(-1).topk(case.cfg.top_k)
    if case.cfg.normalise:
        scores = scores / scores.sum()
    y = torch.zeros_like(x)
    for score, e in zip(scores, chosen.tolist(), strict=True):
        gate, up = (w["experts/gate_up"][e] @ x).chunk(2)
        y = y + score * (w["experts/down"][e] @ (gate * torch.sigmoid(gate) * up))
    return y


def attend(case: Training, w: dict[str, Tensor], x: Tensor, valid: Tensor) -> Tensor:
    positions, heads = len(x), case.cfg.heads
    q, k, v = (
        (x @ part.T).view(positions, heads, -1).transpose(0, 1)
        for part in w["attention/qkv"].chunk(3)
    )
    q, k = turn(q), turn(k)
    before = torch.ones(positions, positions).tril().bool()
    open_to = before & valid[None, :] | torch.eye(positions).bool()
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~open_to, -math.inf)
    mixed = scores.softmax(-1) @ v
    return mixed.transpose(0, 1).reshape(positions, -1) @ w["attention/out"].T


def turn(x: Tensor) -> Tensor:
    """Channels c and c + C/2 of position s as a complex number, turned by s 10000^(-2c/C)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    places, exponents = torch.arange(x.shape[1]).double(), torch.arange(half).double() / half
    angles = places[:, None] * 10_000.0**-exponents
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def rate(chosen: Chosen, step: int) -> float:
    """The schedules, by their definitions, for a run of 8 steps."""
    rising = min(1.0, (step + 1) / chosen.warmup) if chosen.warmup else 1.0
    start = {"wsd": 5, "constant": 0}.get(chosen.schedule, chosen.warmup)
    done = min(max((step - start) / (8 - start), 0.0), 1.0)
    shape = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "linear": 1 - done,
        "wsd": 1 - done,
    }
    return chosen.lr * rising * shape[chosen.schedule]


def optimizer(chosen: Chosen, params: list[Tensor]) -> torch.optim.Optimizer:
    decay = chosen.weight_decay
    if chosen.name == "adamw":
        return torch.optim.AdamW(params, lr=0.0, betas=(0.9, 0.95), eps=EPS, weight_decay=decay)
    momentum = 0.0 if chosen.name == "sgd" else 0.9
    nesterov = chosen.name == "nesterov"
    return torch.optim.SGD(params, 0.0, momentum, weight_decay=decay, nesterov=nesterov)


def label_of(path: str) -> str:
    return "expert" if "/experts/" in path else "dense"


def named(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Leaves by path, in an order of their own: nothing here flattens as the library does."""
    if isinstance(tree, Tensor):
        return {prefix.rstrip("/"): tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[str, Tensor] = {}
    for key, child in items:
        found |= named(child, f"{prefix}{key}/")
    return found
