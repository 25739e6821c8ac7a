"""The same MoE block by several systems: what :mod:`moe_block` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_ep.moe import dispatch, moe
from functional_ep.routing import route
from sharding import Comm


class Block(NamedTuple):
    """Widths of the model and of one expert, experts, and how many a token chooses."""

    dim: int
    ffn: int
    experts: int
    top_k: int


BLOCKS: Mapping[str, Block] = {
    "mixtral": Block(4096, 14336, 8, 2),  # Mixtral 8x7B
    "deepseek": Block(2048, 1408, 64, 6),  # DeepSeek-V2-Lite, its routed experts
}


class Inputs(NamedTuple):
    """What is differentiated by, and ``slope``, the gradient of the block's result."""

    x: Tensor
    router: Tensor
    gate_up: Tensor
    down: Tensor
    slope: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self[:4]

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.detach().to(dtype) for x in self))


Run = Callable[[], Sequence[Tensor]]  # gradients of the leaves; nothing where there are none
System = Callable[[Block, Inputs, Comm], Run]


def make_inputs(block: Block, tokens: int, device: torch.device) -> Inputs:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device, generator=random) * scale

    d, f, e, _ = block
    return Inputs(
        normal(tokens, d),
        normal(e, d, scale=d**-0.5),
        normal(e, 2 * f, d, scale=d**-0.5),
        normal(e, d, f, scale=f**-0.5),
        normal(tokens, d),
    )


def differentiated(block: Callable[..., Tensor], inputs: Inputs) -> Run:
    leaves = [x.detach().requires_grad_() for x in inputs.leaves]
    return lambda: torch.autograd.grad(block(*leaves), leaves, inputs.slope)


def ours(block: Block, inputs: Inputs, comm: Comm) -> Run:
    def run(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = route(F.linear(x, router), block.top_k)
        return moe({"gate_up": gate_up, "down": down}, x, routing, (), comm)

    return differentiated(run, inputs)


def by_transformers(implementation: str) -> System:
    def system(block: Block, inputs: Inputs, comm: Comm) -> Run:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=block.dim,
            intermediate_size=block.ffn,
            num_local_experts=block.experts,
            num_experts_per_tok=block.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralSparseMoeBlock(config)

        def run(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            experts = {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
            named = {"gate.weight": router, **experts}
            y: Any = torch.func.functional_call(module, named, (x[None],))
            return (y[0] if isinstance(y, tuple) else y).view(x.shape)

        return differentiated(run, inputs)

    return system


def by_liger(block: Block, inputs: Inputs, comm: Comm) -> Run:
    from liger_kernel.ops.fused_moe import (  # pyright: ignore[reportMissingImports]
        LigerFusedMoEFunction,
    )

    def run(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = route(F.linear(x, router), block.top_k)
        scores = routing.scores_TK.to(x.dtype)
        return LigerFusedMoEFunction.apply(x, gate_up, down, routing.ids_TK.int(), scores)

    return differentiated(run, inputs)


def products_alone(block: Block, inputs: Inputs, comm: Comm) -> Run:
    """Of the block's rows, sorted: two products forward, two for rows and two for weights back."""
    x, router, gate_up, down, slope = inputs
    ids = route(F.linear(x, router), block.top_k).ids_TK
    rows, counts = dispatch(x, ids, block.experts, (), comm)[:2]
    back = dispatch(slope, ids, block.experts, (), comm).rows_RD
    hidden = rows.new_ones(len(rows), 2 * block.ffn)
    between, ends = rows.new_ones(len(rows), block.ffn), counts.ends(rows.device)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=ends)

    def run() -> tuple[Tensor, ...]:
        product(rows, gate_up.mT)
        product(between, down.mT)
        product(back, down)
        product(back.t(), between)
        product(hidden, gate_up)
        product(hidden.t(), rows)
        return ()

    return run


def square(side: int) -> System:
    def system(block: Block, inputs: Inputs, comm: Comm) -> Run:
        a = torch.ones(side, side, dtype=inputs.x.dtype, device=inputs.x.device)
        return lambda: (torch.mm(a, a),)[:0]

    return system


SQUARE, OURS = "a square product", "functional-ep"
SYSTEMS: Mapping[str, System] = {
    "products alone": products_alone,
    OURS: ours,
    "transformers, grouped_mm": by_transformers("grouped_mm"),
    "liger-kernel, Triton": by_liger,
}
