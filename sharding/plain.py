"""Outside of transforms: what has to do with memory sees plain tensors only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._C._functorch as _functorch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def plain(x: Tensor) -> Tensor:
    """The tensor inside of the wrappers that ``grad`` and ``vjp`` put around it.

    >>> seen = []
    >>> _ = torch.func.grad(lambda x: (seen.append(plain(x)), x)[1])(torch.tensor(1.0))
    >>> seen
    [tensor(1.)]
    """
    while _functorch.is_gradtrackingtensor(x):
        x = _functorch.get_unwrapped(x)
    return x


@contextmanager
def outside_transforms() -> Iterator[None]:
    """While this is active, tensors are made and changed outside of all transforms.

    Inside of one even a fresh tensor has a wrapper around it, which dies with the transform.
    """
    if torch._C._are_functorch_transforms_active():
        with temporarily_clear_interpreter_stack():
            yield
    else:
        yield
