"""A Mixture-of-Experts language model in a few pure functions.

Pre-norm transformer: RMSNorm, causal attention with rotary positions, RMSNorm, mixture of experts.
Shape suffixes: B sequences, S positions, T = B S tokens, D model, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sharding import Comm, Plan, sharded
from sharding.mesh import Axes
from sharding.sharded import Backward

from .attention import attention, rotary_table
from .cross_entropy import IGNORE, cross_entropy
from .differentiate import sum_over_ranks
from .labels import label_by_path
from .moe import moe
from .routing import Statistics, balance_loss, route, statistics

Params = dict[str, Any]
Batch = Mapping[str, Tensor]

labels = label_by_path({"*/experts/*": "expert"}, default="dense")


@dataclass(frozen=True)
class Config:
    """The shape of the model, and the weights of its auxiliary losses.

    ``ffn`` is the hidden width of one expert, ``top_k`` the experts per token; ``normalise`` makes
    a token's scores add up to one, ``tied`` uses the embedding as the head. ``balance`` weighs the
    load-balancing loss and ``z`` the router's z loss, each a mean over tokens summed over layers.
    """

    vocab: int = 256
    dim: int = 256
    layers: int = 4
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    ffn: int = 384
    normalise: bool = True
    tied: bool = True
    balance: float = 0.01
    z: float = 1e-3
    theta: float = 10_000.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab", "layers", "experts", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if self.heads < 1 or self.dim % (2 * self.heads):
            raise ValueError(
                f"dim={self.dim} and heads={self.heads}: every head needs an even, equal share"
            )
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k}: choose from 1 to experts={self.experts}")


def init(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Global params on CPU, a pure function of the seed: normal with variance 1/fan-in, norms one.

    Projections into the residual stream are divided by ``sqrt(2 layers)``. Memory is that of the
    whole model.

    >>> params = init(Config(dim=8, heads=2, layers=1, experts=2, ffn=4))
    >>> params["blocks"][0]["experts"]["gate_up"].shape
    torch.Size([2, 8, 8])
    """
    random = torch.Generator().manual_seed(seed)
    d, narrow = cfg.dim, (2 * cfg.layers) ** -0.5

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=random, dtype=torch.float32)
        return (x * (scale * shape[-1] ** -0.5)).to(dtype)

    def block() -> Params:
        return {
            "norm1": torch.ones(d, dtype=dtype),
            "attention": {"qkv": normal(3 * d, d), "out": normal(d, d, scale=narrow)},
            "norm2": torch.ones(d, dtype=dtype),
            "router": normal(cfg.experts, d),
            "experts": {
                "gate_up": normal(cfg.experts, 2 * cfg.ffn, d),
                "down": normal(cfg.experts, d, cfg.ffn, scale=narrow),
            },
        }

    params: Params = {"embed": normal(cfg.vocab, d)}
    params["blocks"] = [block() for _ in range(cfg.layers)]
    params["norm"] = torch.ones(d, dtype=dtype)
    return params if cfg.tied else params | {"head": normal(cfg.vocab, d)}


def units(params: Params) -> list[Params]:
    """The subtrees that are gathered one after another: embedding, each block, norm and head.

    Works on params, shards and leaves of a plan alike; a tied embedding appears twice.
    """
    last = {"norm": params["norm"], "head": params.get("head", params["embed"])}
    return [{"embed": params["embed"]}, *params["blocks"], last]


class _Stream(NamedTuple):
    """What flows from unit to unit."""

    x_BSD: Tensor
    layers: tuple[Statistics, ...] = ()


class _Constants(NamedTuple):
    """What every unit sees beside it."""

    rotary: tuple[Tensor, Tensor]
    mask_BS: Tensor | None  # False where a token is padding


def apply(
    cfg: Config, plan: Plan, comm: Comm, backward: Backward = "regather"
) -> Callable[..., Tensor]:
    """``logits(shards, input_ids, attention_mask=None)``: ``(B, S) -> (B, S, V)``.

    Args:
        cfg: the model.
        plan: of params in the shape of :func:`init`.
        comm: the ranks; all must call together, each with its own sequences.
        backward: see :func:`sharding.sharded`.
    """
    run = sharded(_functions(cfg, plan, comm), plan.at(units(plan.tree)), comm, backward)

    def logits(shards: Params, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return run(units(shards), input_ids, _constants(cfg, input_ids, attention_mask))[0]

    return logits


def loss(
    cfg: Config, plan: Plan, comm: Comm, backward: Backward = "regather"
) -> Callable[[Params, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """``loss(shards, batch) -> (sum, count, aux)``: cross-entropy and auxiliary losses, summed.

    The batch is ``dict(input_ids, labels, attention_mask)`` of ``(B, S)``, the mask optional;
    ``labels[b, s]`` is the token that follows position s, or -100 for none. Divided by the count of
    all ranks, the sum is the mean cross-entropy per label plus ``balance`` and ``z`` times their
    means per token. Aux holds sums: ``nll``, ``balance``, ``z``, ``tokens`` and
    ``tokens_per_expert (layers, E)``.

    Raises:
        ValueError: from the loss, for a batch without ids and labels of one shape.
    """
    run = sharded(_functions(cfg, plan, comm), plan.at(units(plan.tree)), comm, backward)

    def total(shards: Params, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        input_ids, targets = _checked(batch)
        constants = _constants(cfg, input_ids, batch.get("attention_mask"))
        logits, layers = run(units(shards), input_ids, constants)
        nll = cross_entropy(logits.flatten(0, 1), targets.flatten())
        count = (targets != IGNORE).sum()
        balance, z, tokens, per_label = _auxiliary(cfg, layers, count, comm)
        auxiliary = (cfg.balance * balance + cfg.z * z) * per_label.to(z.dtype)
        counts_LE = torch.stack([layer.counts_E for layer in layers])
        sums = {"nll": nll, "balance": balance, "z": z}
        aux = {name: x.detach() for name, x in sums.items()}
        aux |= {"tokens": tokens, "tokens_per_expert": counts_LE}
        return nll + auxiliary, count, aux

    return total


def _auxiliary(
    cfg: Config, layers: tuple[Statistics, ...], count: Tensor, comm: Comm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Local balance and z sums, local tokens, and the global ratio of labels to tokens.

    One message for all layers: only integers travel, no gradient.
    """
    counts_LE = torch.stack([layer.counts_E for layer in layers])
    tokens = counts_LE[0].sum() // cfg.top_k
    all_LE, all_labels, all_tokens = sum_over_ranks([counts_LE, count, tokens], comm)
    balance = torch.stack(
        [balance_loss(layer.probs_E, c_E) for layer, c_E in zip(layers, all_LE, strict=True)]
    ).sum()
    z = torch.stack([layer.z for layer in layers]).sum()
    return balance, z, tokens, all_labels.double() / all_tokens.clamp(min=1)


def _functions(cfg: Config, plan: Plan, comm: Comm) -> list[Callable[..., Any]]:
    """What each unit computes on its view."""
    blocks = plan.tree["blocks"]
    if len(blocks) != cfg.layers:
        raise ValueError(f"the config has {cfg.layers} layers, the params have {len(blocks)}")

    def embed(view: Params, input_ids: Tensor, constants: _Constants) -> _Stream:
        return _Stream(F.embedding(input_ids, view["embed"]))

    def head(view: Params, stream: _Stream, constants: _Constants) -> Any:
        x_BSD = F.rms_norm(stream.x_BSD, (cfg.dim,), view["norm"], cfg.eps)
        return F.linear(x_BSD, view["head"]), stream.layers

    axes = [_expert_axes(plan["blocks"][i]) for i in range(len(blocks))]
    return [embed, *(_block(cfg, each, comm) for each in axes), head]


def _expert_axes(block: Plan) -> Axes:
    """The mesh axes that split a block's experts while computing."""
    found = {block.rules[leaf.label].compute for leaf in block["experts"].leaves}
    if len(found) != 1:
        expert = block["experts"].leaves[0]
        raise ValueError(f"{expert}: experts of one layer are split over {found}")
    return found.pop()


def _block(cfg: Config, axes: Axes, comm: Comm) -> Callable[..., _Stream]:
    def block(view: Params, stream: _Stream, constants: _Constants) -> _Stream:
        x_BSD, layers = stream
        h_BSD = F.rms_norm(x_BSD, (cfg.dim,), view["norm1"], cfg.eps)
        weights = view["attention"]["qkv"], view["attention"]["out"]
        x_BSD = x_BSD + attention(h_BSD, *weights, cfg.heads, constants.rotary, constants.mask_BS)
        h_BSD = F.rms_norm(x_BSD, (cfg.dim,), view["norm2"], cfg.eps)
        h_TD = h_BSD.flatten(0, 1)
        routing = route(F.linear(h_TD, view["router"]), cfg.top_k, cfg.normalise)
        y_TD = moe(view["experts"], h_TD, routing, axes, comm)
        valid_T = None if constants.mask_BS is None else constants.mask_BS.flatten()
        seen = statistics(routing, valid_T)
        return _Stream(x_BSD + y_TD.view_as(x_BSD), (*layers, seen))

    return block


def _constants(cfg: Config, input_ids: Tensor, attention_mask: Tensor | None) -> _Constants:
    rotary = rotary_table(input_ids.shape[1], cfg.dim // cfg.heads, cfg.theta, input_ids.device)
    return _Constants(rotary, None if attention_mask is None else attention_mask.bool())


def _checked(batch: Batch) -> tuple[Tensor, Tensor]:
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(f"batch[{name!r}] is missing; the batch has {sorted(batch)}")
    input_ids, targets = batch["input_ids"], batch["labels"]
    if input_ids.shape != targets.shape or input_ids.dim() != 2:
        raise ValueError(
            f"batch['input_ids'] {tuple(input_ids.shape)} and batch['labels'] "
            f"{tuple(targets.shape)} must have one shape (B, S)"
        )
    return input_ids, targets
