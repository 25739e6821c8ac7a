"""Node: an autograd.Function whose call costs little Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch._C._functorch as _functorch
from torch._functorch.autograd_function import custom_function_call
from torch.autograd import forward_ad

Unpack: TypeAlias = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor | None]]


class Node(torch.autograd.Function):
    """A function with ``setup_context``, called with positional arguments only.

    ``torch.autograd.Function.apply`` inspects the signature of such a function at every call, which
    takes longer than most of what a call does here (50 of 70 microseconds). Nothing else differs.

    >>> class Double(Node):
    ...     @staticmethod
    ...     def forward(x):
    ...         return 2 * x
    ...     @staticmethod
    ...     def setup_context(ctx, inputs, output):
    ...         pass
    ...     @staticmethod
    ...     def backward(ctx, g):
    ...         return 2 * g
    >>> torch.func.grad(Double.apply)(torch.tensor(3.0))
    tensor(2.)
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return custom_function_call(cls, *args)  # pyright: ignore[reportCallIssue]
        alive = _functorch.unwrap_if_dead
        args = tuple([alive(x) if isinstance(x, torch.Tensor) else x for x in args])
        if not torch.is_grad_enabled() and not _have_tangents(args):
            return cls.forward(*args)  # nothing is recorded: in most backward passes
        plain: Any = super(torch.autograd.Function, cls)
        return plain.apply(*args)


def _have_tangents(args: tuple[Any, ...]) -> bool:
    level, unpack = forward_ad._current_level, cast("Unpack", torch._unpack_dual)
    if level < 0:
        return False
    return any(unpack(x, level)[1] is not None for x in args if isinstance(x, torch.Tensor))
