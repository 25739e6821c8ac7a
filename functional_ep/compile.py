"""compiled(f): f as fused kernels under plain autograd, and f itself under every transform."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from sharding.fetched import HOOKS
from sharding.node import have_tangents
from sharding.tree import flatten

P = ParamSpec("P")
R = TypeVar("R")


def compiled(f: Callable[P, R]) -> Callable[P, R]:
    """``compiled(f) = f``, up to rounding: through ``torch.compile`` where nothing transforms.

    Transforms of ``torch.func`` and dual tensors cannot see into compiled code: for them it is f
    itself, so that compositions work as before. Random numbers are those of f. The first call
    takes seconds and, on CPU, needs a C++ compiler; another size is compiled once more, then for
    any of them but 0 and 1. What is compiled eight times (``torch._dynamo.config.recompile_limit``)
    runs as f from then on.

    A torch that is built for CUDA, on a machine without a GPU, ends in a segmentation fault (seen
    in 2.11.0) where threads compile, as those of ``simulate`` do, after the first of them that did
    has ended. It does not if the main thread is the first, with any function: call
    ``compiled(f)(x)`` there before.

    Args:
        f: a function of tensors. What it calls that holds a collective, or anything else that torch
            cannot compile, it calls through :func:`uncompiled`.

    Raises:
        RuntimeError: from torch, where plain autograd differentiates the gradient again
            (``create_graph=True``): ``torch.func`` does that.
        TorchDynamoException: torch cannot compile f.

    >>> compiled(torch.sin)(torch.zeros(2))
    tensor([0., 0.])
    """
    from torch._dynamo.eval_frame import skip_code  # takes a second and memory
    from torch._dynamo.exc import TorchDynamoException

    for hook in HOOKS:  # they are called in the midst of f, where the compiler would trace them
        skip_code(hook.__code__)
    fast = torch.compile(f, options={"fallback_random": True})

    @wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _are_transformed(args, kwargs):
            return f(*args, **kwargs)
        try:
            return fast(*args, **kwargs)
        except TorchDynamoException as error:
            error.add_note(f"{f} is compiled: let it call what holds a collective by uncompiled()")
            raise

    return call


def uncompiled(f: Callable[P, R]) -> Callable[P, R]:
    """``uncompiled(f) = f``, which what is compiled calls as it is: ranks may meet in it.

    >>> uncompiled(torch.cos)(torch.zeros(2))
    tensor([1., 1.])
    """
    disabled: Any = torch.compiler.disable(f)
    return disabled


def _are_transformed(*trees: Any) -> bool:
    """Whether anything but plain autograd looks on; forward mode outside of torch.func as well."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and have_tangents(flatten(trees)[0])
