"""SwiGLU that keeps one tensor: ``silu(gate) * up``, derivatives from its input alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharding.closed import closed
from sharding.node import Node


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``: ``(R, 2F) -> (R, F)``, gate in the first half.

    Autograd of the composition would keep four tensors of width F, this keeps its input. Closed
    under every transform (torch's own silu has no second forward derivative).
    Source: Shazeer, GLU Variants Improve Transformer, 2020.

    >>> swiglu(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
    tensor([[0.0000, 1.4621]])
    """
    return _SwiGLU.apply(gate_up)


class _SwiGLU(Node):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,), (g,) = ctx.saved_tensors, grads
        slope, swish, up = _parts(gate_up)
        return torch.cat([g * up * slope, g * swish], -1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        # A node of its own: torch turns forward mode off in here, for all levels and not just this.
        return closed(_push_forward)(*ctx.saved_tensors, *tangents)[0]


def _push_forward(gate_up: Tensor, tangent: Tensor) -> tuple[Tensor]:
    slope, swish, up = _parts(gate_up)
    d_gate, d_up = tangent.chunk(2, -1)
    return (d_gate * up * slope + d_up * swish,)


def _parts(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``silu'(gate), silu(gate), up``."""
    gate, up = gate_up.chunk(2, -1)
    s = torch.sigmoid(gate)
    swish = gate * s
    return s + swish * (1 - s), swish, up
