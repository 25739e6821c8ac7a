"""Causal self-attention with rotary positions.

Shape suffixes: B sequences, S positions, D model, H heads, C channels per head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._C._functorch as _functorch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.torch_version import TorchVersion

from sharding.plain import plain

# Before, the compiler takes what the fused kernel sums up of float64 rows for float32.
COMPILES_FUSED_FLOAT64 = TorchVersion(torch.__version__) >= "2.13"


def rotary_table(
    positions: int, channels: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """``cos, sin`` of ``s theta^(-2c/C)``, each ``(S, C/2)`` in float64.

    Source: Su et al., RoFormer, 2021.

    >>> rotary_table(2, 2, 10_000.0)[1].flatten()
    tensor([0.0000, 0.8415], dtype=torch.float64)
    """
    exponents = torch.arange(0, channels, 2, device=device, dtype=torch.float64) / channels
    places = torch.arange(positions, device=device, dtype=torch.float64)
    angles_SC = torch.outer(places, theta**-exponents)
    return angles_SC.cos(), angles_SC.sin()


def rotate(x_BHSC: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair of channels ``(c, c + C/2)`` turned by its position's angle.

    >>> x = torch.ones(1, 1, 2, 2)
    >>> rotate(x, rotary_table(2, 2, 1.0)).norm(dim=-1)
    tensor([[[1.4142, 1.4142]]])
    """
    cos, sin = (t.to(x_BHSC.dtype) for t in table)
    a, b = x_BHSC.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def mask_bias(mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to ``q k^T``: 0 where a position may look, -inf elsewhere, (B, 1, S, S).

    No position looks ahead, and none at what the mask says is not there, but at itself: attention
    to nothing is not a number. Made once, one tensor is kept for all layers.

    >>> mask_bias(torch.tensor([[False, True]]), torch.float32)[0, 0]
    tensor([[0., -inf],
            [-inf, 0.]])
    """
    s = mask_BS.shape[1]
    causal = torch.ones(s, s, dtype=torch.bool, device=mask_BS.device).tril()
    itself = torch.eye(s, dtype=torch.bool, device=mask_BS.device)
    allowed = (causal & mask_BS[:, None, None, :]) | itself
    return torch.zeros(allowed.shape, dtype=dtype, device=mask_BS.device).masked_fill(
        ~allowed, -torch.inf
    )


def attention(
    x_BSD: Tensor,
    qkv: Tensor,
    out: Tensor,
    heads: int,
    rotary: tuple[Tensor, Tensor],
    bias_B1SS: Tensor | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(C), causal) v``, projected back to D.

    Args:
        x_BSD: normed input.
        qkv: ``(3D, D)``, queries above keys above values.
        out: ``(D, D)``.
        heads: H.
        rotary: from :func:`rotary_table`.
        bias_B1SS: from :func:`mask_bias`; without one every position is there.
    """
    b, s, d = x_BSD.shape
    q, k, v = F.linear(x_BSD, qkv).view(b, s, 3, heads, d // heads).permute(2, 0, 3, 1, 4).unbind()
    q, k = rotate(q, rotary), rotate(k, rotary)
    with _kernel(q):
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias_B1SS, is_causal=bias_B1SS is None
        )
    return F.linear(y.transpose(1, 2).reshape(b, s, d), out)


def _kernel(q: Tensor) -> AbstractContextManager[Any]:
    """Fused attention has neither forward mode nor lanes nor a second derivative; plain has all."""
    if torch.compiler.is_compiling():  # which is only done where nothing transforms
        fused = COMPILES_FUSED_FLOAT64 or q.dtype != torch.float64
        return nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
    return nullcontext() if _differentiated_once(q) else sdpa_kernel(SDPBackend.MATH)


def _differentiated_once(q: Tensor) -> bool:
    """Whether nothing is active, or one reverse mode around what autograd does not record itself.

    What is computed again in a backward pass that is differentiated has autograd around it.
    """
    stack = _functorch.get_interpreter_stack()
    if not stack:
        return True
    one = len(stack) == 1 and stack[0].key() == _functorch.TransformType.Grad
    return one and not plain(q).requires_grad
