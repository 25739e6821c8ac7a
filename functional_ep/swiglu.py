"""SwiGLU that keeps one tensor: ``silu(gate) * up``, derivatives from its input alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sharding.closed import closed, pull_back
from sharding.node import Node

from .grouped import Counts, add, fitting, grouped_mm, weight_gradient


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``: ``(R, 2F) -> (R, F)``, gate in the first half.

    Autograd of the composition would keep four tensors of width F, this keeps its input. Closed
    under every transform (torch's own silu has no second forward derivative).
    Source: Shazeer, GLU Variants Improve Transformer, 2020.

    >>> swiglu(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
    tensor([[0.0000, 1.4621]])
    """
    return _SwiGLU.apply(gate_up)


def swiglu_mm(gate_up: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
    """``y_e = swiglu(h_e) w_e^T``: ``(R, 2F)`` sorted by expert, ``(e, O, F)`` -> ``(R, O)``.

    As one node, which keeps its inputs and not what lies between: SwiGLU is cheaper to compute
    again, beside its own pull-back, than to hold and to read.

    Raises:
        ValueError: counts that do not add up to the rows, or are not one per expert.

    >>> swiglu_mm(torch.tensor([[0.0, 1.0, 5.0, 2.0]]), torch.tensor([[[1.0, 1.0]]]), [1])
    tensor([[1.4621]])
    """
    return _SwiGLUMm.apply(gate_up, w, fitting(counts, len(gate_up), len(w)))


class _SwiGLU(Node):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Pull.apply(*ctx.saved_tensors, grads[0])[1]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        # A node of its own: torch turns forward mode off in here, for all levels and not just this.
        return closed(_push_forward)(*ctx.saved_tensors, *tangents)[0]


class _SwiGLUMm(Node):
    @staticmethod
    def forward(gate_up: Tensor, w: Tensor, counts: Counts) -> Tensor:
        return grouped_mm(_SwiGLU.forward(gate_up), w, counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate_up, w, ctx.counts = inputs
        ctx.save_for_backward(gate_up, w)
        ctx.save_for_forward(gate_up, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (g,), (gate_up, w) = grads, ctx.saved_tensors
        y, pulled = _Pull.apply(gate_up, grouped_mm(g, w.mT, ctx.counts))
        return pulled, weight_gradient(ctx, g, y) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (dh, dw, _), (gate_up, w) = tangents, ctx.saved_tensors
        dy = None if dh is None else closed(_push_forward)(gate_up, dh)[0]
        from_h = None if dy is None else grouped_mm(dy, w, ctx.counts)
        from_w = None if dw is None else grouped_mm(swiglu(gate_up), dw, ctx.counts)
        return add(from_h, from_w)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        gate_up, w, counts = args
        lane = torch.vmap(lambda h, w: grouped_mm(swiglu(h), w, counts), in_dims[:2])
        return lane(gate_up, w), 0


class _Pull(Node):
    """``gate_up, g -> swiglu(gate_up), its pull-back of g``: both from one read of the gate."""

    @staticmethod
    def forward(gate_up: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = gate_up.chunk(2, -1)
        pulled = gate_up.new_empty(gate_up.shape)
        to_gate, to_up = pulled.chunk(2, -1)
        swish = F.silu(gate)
        y = swish * up
        torch.mul(g, swish, out=to_up)
        torch.mul(g, up, out=swish)
        torch.ops.aten.silu_backward.grad_input(swish, gate, grad_input=to_gate)
        return y, pulled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        again = closed(lambda *args: pull_back(_pulled, args[:2], args[2:]))
        return again(*ctx.saved_tensors, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        given = [
            torch.zeros_like(x) if d is None else d for x, d in zip(saved, tangents, strict=True)
        ]
        return closed(_push_pulled)(*saved, *given)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        lanes = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args, in_dims, strict=True)
        ]
        return _Pull.apply(*lanes), (0, 0)


def _push_forward(gate_up: Tensor, tangent: Tensor) -> tuple[Tensor]:
    slope, swish, up = _parts(gate_up)
    d_gate, d_up = tangent.chunk(2, -1)
    return (d_gate * up * slope + d_up * swish,)


def _pulled(gate_up: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """:class:`_Pull` in operations that are differentiable to any order."""
    slope, swish, up = _parts(gate_up)
    return swish * up, torch.cat([g * up * slope, g * swish], -1)


def _push_pulled(gate_up: Tensor, g: Tensor, *tangents: Tensor) -> tuple[Tensor, ...]:
    # A dual tensor cannot be made of an expanded one, which a cotangent often is.
    primals = gate_up.contiguous(), g.contiguous()
    return torch.func.jvp(_pulled, primals, tangents)[1]


def _parts(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``silu'(gate), silu(gate), up``."""
    gate, up = gate_up.chunk(2, -1)
    s = torch.sigmoid(gate)
    swish = gate * s
    return s + swish * (1 - s), swish, up
