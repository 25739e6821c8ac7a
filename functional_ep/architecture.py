"""The language model's shape, its params, and what each unit of it computes on its view.

Pre-norm transformer: RMSNorm, causal attention with rotary positions, RMSNorm, mixture of experts.
Shape suffixes: B sequences, S positions, T = B S tokens, D model, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sharding import Comm, Plan
from sharding.mesh import Axes

from .attention import attention, mask_bias, rotary_table
from .compile import compiled
from .labels import label_by_path
from .moe import moe
from .routing import Routing, Statistics, route, statistics

Params = dict[str, Any]

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
        for name in ("vocab", "dim", "layers", "experts", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if self.heads < 1 or self.dim % (2 * self.heads):
            raise ValueError(
                f"dim={self.dim} and heads={self.heads}: every head needs an even, equal share"
            )
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k}: choose from 1 to experts={self.experts}")
        for name in ("balance", "z", "eps"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name}={getattr(self, name)}: at least 0, and finite")
        if not 0 < self.theta < inf:
            raise ValueError(f"theta={self.theta}: positive, and finite")


def init(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Global params on CPU, a pure function of the seed: normal with variance 1/fan-in, norms one.

    Projections into the residual stream are divided by ``sqrt(2 layers)``. Memory is that of the
    whole model.

    >>> params = init(Config(dim=8, heads=2, layers=1, experts=2, ffn=4))
    >>> params["blocks"][0]["experts"]["gate_up"].shape
    torch.Size([2, 8, 8])
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=random, dtype=torch.float32)
        return (x * (scale * shape[-1] ** -0.5)).to(dtype)

    return _params(cfg, normal, partial(torch.ones, dtype=dtype))


def shapes(cfg: Config, dtype: torch.dtype = torch.float32) -> Params:
    """The params of :func:`init` on the meta device: all that a plan has to know, and no memory.

    >>> shapes(Config(dim=8, heads=2, layers=1, experts=2, ffn=4))["norm"]
    tensor(..., device='meta', size=(8,))
    """

    def empty(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return _params(cfg, empty, empty)


def _params(cfg: Config, normal: Callable[..., Tensor], ones: Callable[[int], Tensor]) -> Params:
    d, narrow = cfg.dim, (2 * cfg.layers) ** -0.5

    def block() -> Params:
        return {
            "norm1": ones(d),
            "attention": {"qkv": normal(3 * d, d), "out": normal(d, d, scale=narrow)},
            "norm2": ones(d),
            "router": normal(cfg.experts, d),
            "experts": {
                "gate_up": normal(cfg.experts, 2 * cfg.ffn, d),
                "down": normal(cfg.experts, d, cfg.ffn, scale=narrow),
            },
        }

    params: Params = {"embed": normal(cfg.vocab, d)}
    params["blocks"] = [block() for _ in range(cfg.layers)]
    params["norm"] = ones(d)
    return params if cfg.tied else params | {"head": normal(cfg.vocab, d)}


def units(params: Params) -> list[Params]:
    """The subtrees that are gathered one after another: embedding, each block, norm and head.

    Works on params, shards and leaves of a plan alike; a tied embedding appears twice.
    """
    last = {"norm": params["norm"], "head": params.get("head", params["embed"])}
    return [{"embed": params["embed"]}, *params["blocks"], last]


class Stream(NamedTuple):
    """What flows from unit to unit."""

    x_BSD: Tensor
    layers: tuple[Statistics, ...] = ()


class Chosen(NamedTuple):
    """A block's work before its experts: the residual stream, their input, and which of them."""

    x_BSD: Tensor
    h_TD: Tensor
    routing: Routing


class Constants(NamedTuple):
    """What every unit sees beside it."""

    rotary: tuple[Tensor, Tensor]
    mask_BS: Tensor | None  # False where a token is padding
    bias_B1SS: Tensor | None


def functions(cfg: Config, plan: Plan, comm: Comm, compile: bool) -> list[Callable[..., Any]]:
    """What each unit computes on its view."""
    blocks = plan.tree["blocks"]
    if len(blocks) != cfg.layers:
        raise ValueError(f"the config has {cfg.layers} layers, the params have {len(blocks)}")
    plan.check_whole(lambda path: "/experts/" in path)

    def embed(view: Params, input_ids: Tensor, constants: Constants) -> Stream:
        if not input_ids.numel():  # torch cannot differentiate the embedding of nothing twice
            lanes = input_ids.sum().to(view["embed"].dtype)  # 0, of each lane if they are mapped
            return Stream((view["embed"][0, 0] + lanes).expand(*input_ids.shape, cfg.dim))
        return Stream(F.embedding(input_ids, view["embed"]))

    def head(view: Params, stream: Stream, constants: Constants) -> Any:
        x_BSD = F.rms_norm(stream.x_BSD, (cfg.dim,), view["norm"], cfg.eps)
        return F.linear(x_BSD, view["head"]), stream.layers

    axes = [_expert_axes(plan["blocks"][i]) for i in range(len(blocks))]
    to_experts = partial(_to_experts, cfg)
    to_experts = compiled(to_experts) if compile else to_experts
    return [embed, *(_block(cfg, each, comm, to_experts) for each in axes), head]


def _expert_axes(block: Plan) -> Axes:
    """The mesh axes that split a block's experts while computing."""
    found = {block.rules[leaf.label].compute for leaf in block["experts"].leaves}
    if len(found) != 1:
        expert = block["experts"].leaves[0]
        raise ValueError(f"{expert}: experts of one layer are split over {found}")
    return found.pop()


def _block(
    cfg: Config, axes: Axes, comm: Comm, to_experts: Callable[..., Chosen]
) -> Callable[..., Stream]:
    def block(view: Params, stream: Stream, constants: Constants) -> Stream:
        x_BSD, h_TD, routing = to_experts(view, stream.x_BSD, constants)
        y_TD = moe(view["experts"], h_TD, routing, axes, comm)
        valid_T = None if constants.mask_BS is None else constants.mask_BS.flatten()
        seen = statistics(routing, valid_T)
        return Stream(x_BSD + y_TD.view_as(x_BSD), (*stream.layers, seen))

    return block


def _to_experts(cfg: Config, view: Params, x_BSD: Tensor, constants: Constants) -> Chosen:
    h_BSD = F.rms_norm(x_BSD, (cfg.dim,), view["norm1"], cfg.eps)
    weights = view["attention"]["qkv"], view["attention"]["out"]
    x_BSD = x_BSD + attention(h_BSD, *weights, cfg.heads, constants.rotary, constants.bias_B1SS)
    h_TD = F.rms_norm(x_BSD, (cfg.dim,), view["norm2"], cfg.eps).flatten(0, 1)
    return Chosen(x_BSD, h_TD, route(F.linear(h_TD, view["router"]), cfg.top_k, cfg.normalise))


def constants_of(
    cfg: Config, plan: Plan, input_ids: Tensor, attention_mask: Tensor | None
) -> Constants:
    """Made once, in the dtype in which the embedding is computed."""
    (embed,) = plan["embed"].layouts
    table = rotary_table(input_ids.shape[1], cfg.dim // cfg.heads, cfg.theta, input_ids.device)
    cos, sin = (x.to(embed.compute_dtype) for x in table)
    if attention_mask is None:
        return Constants((cos, sin), None, None)
    mask_BS = attention_mask.bool()
    return Constants((cos, sin), mask_BS, mask_bias(mask_BS, embed.compute_dtype))
