"""Closedness of one function: each transform of it is that transform of a plain composition."""

from __future__ import annotations

import torch
import transforms
from moe_cases import assert_each_close, normal
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transforms import F, Leaves


def check_closed(f: F, reference: F, x: Leaves, seed: int = 0) -> None:
    """Every transform of f, alone and composed, is that of the reference, to nine digits.

    Both get arguments and give results through a sine, so that no derivative is constant.

    Args:
        f: takes and returns lists of floating-point tensors.
        reference: the same function, composed of operations that torch transforms by itself.
        x: where to compare them, in float64.
        seed: for tangents and cotangents.
    """
    check_transforms(f, reference, x, seed)
    check_autograd(f, reference, x, seed)


def check_transforms(f: F, reference: F, x: Leaves, seed: int = 0) -> None:
    """Those of torch.func."""
    f, reference = bent(f), bent(reference)
    u, v = _directions(reference, x, seed)
    for name, (_, transform) in transforms.SHARED.items():
        assert_each_close(transform(f, x, u, v), transform(reference, x, u, v), name)
    if not any(a.numel() for a in x):
        return  # torch has no Jacobian of a function of no numbers
    expected = transforms.local_matrices(reference, x)
    for name, found in transforms.local_matrices(f, x).items():
        assert_each_close(tree_leaves(found), tree_leaves(expected[name]), name)


def check_autograd(f: F, reference: F, x: Leaves, seed: int = 0) -> None:
    """Backward passes, and backward passes through them."""
    f, reference = bent(f), bent(reference)
    expected = transforms.plain_autograd(reference, x, *_directions(reference, x, seed))
    for name, found in transforms.plain_autograd(f, x, *_directions(f, x, seed)).items():
        assert_each_close(found, expected[name], f"autograd {name}")


def _directions(f: F, x: Leaves, seed: int) -> tuple[Leaves, Leaves]:
    """Tangents and cotangents."""
    u = [normal(tuple(a.shape), seed + 10 + i) for i, a in enumerate(x)]
    return u, [normal(tuple(a.shape), seed + 20 + i) for i, a in enumerate(f(x))]


def bent(f: F) -> F:
    return lambda xs: [y.sin() for y in f([x.sin() for x in xs])]


def mapped(x: Tensor, dim: int | None, lanes: int) -> Tensor:
    """``lanes`` different multiples of a tensor along a new dim; the tensor itself for None."""
    if dim is None:
        return x
    return torch.stack([x * (1 + i) for i in range(lanes)], dim)
