"""Node: an autograd.Function whose call costs little Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, cast

import torch
import torch._C._functorch as _functorch
from torch._functorch.autograd_function import custom_function_call
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

ACCEPTS = "accepts"  # in the metadata of an autograd node
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
        if not torch.is_grad_enabled() and not have_tangents(args):
            return cls.forward(*args)  # nothing is recorded: in most backward passes
        plain: Any = super(torch.autograd.Function, cls)
        return plain.apply(*args)


def have_tangents(xs: Iterable[Any]) -> bool:
    """Whether a tensor among them is a dual one, of forward mode outside of ``torch.func``."""
    level, unpack = forward_ad._current_level, cast("Unpack", torch._unpack_dual)
    if level < 0:
        return False
    return any(unpack(x, level)[1] is not None for x in xs if isinstance(x, torch.Tensor))


def accept(leaf: torch.Tensor, kinds: frozenset[str]) -> GradientEdge:
    """While the result is held, the gradient of this leaf may be of these kinds of tensor.

    Whoever computes it asks :func:`accepted`; what it says holds inside of closed functions too.
    """
    edge = get_gradient_edge(leaf)
    metadata: Any = edge.node.metadata  # a dict, and not the function that its stub says
    metadata[ACCEPTS] = kinds
    return edge


def accepted(node: Any) -> frozenset[str]:
    """The kinds of tensor that may go to a node in a backward pass, directly or through views.

    >>> w = torch.ones(2, requires_grad=True)
    >>> edge = accept(w, frozenset({"sparse"}))
    >>> accepted(w.view(1, 2).grad_fn), accepted(w.exp().grad_fn)
    (frozenset({'sparse'}), frozenset())
    """
    while node is not None and node.name() == "ViewBackward0":
        ((node, _),) = node.next_functions
    return frozenset() if node is None else node.metadata.get(ACCEPTS, frozenset())
