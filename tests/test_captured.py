"""A tensor that a closed function captures would lose its gradient silently, so it is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sharding.closed import closed

W = torch.ones(2, requires_grad=True)


def uses_a_global(x: Tensor) -> tuple[Tensor]:
    return (x * W,)


class Scale:
    """A function that is an object."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        return (x * self.scale,)

    def method(self, x: Tensor) -> tuple[Tensor]:
        return self(x)


def closing_over(scale: Tensor) -> dict[str, Any]:
    """Ways for a function to get at a tensor, by the name under which it is reported."""

    def inner(x: Tensor) -> tuple[Tensor]:
        return (x * scale,)

    scales, by_name = [scale], {"scale": scale}
    return {
        "a closure": inner,
        "a function in a closure": lambda x: inner(x),
        "a list": lambda x: (x * scales[0],),
        "a dict": lambda x: (x * by_name["scale"],),
        "a default": lambda x, scale=scale: (x * scale,),
        "a partial": partial(lambda scale, x: (x * scale,), scale),
        "an object": Scale(scale),
        "a method": Scale(scale).method,
    }


WAYS = tuple(closing_over(torch.ones(2)))


@pytest.mark.parametrize("way", WAYS)
def test_a_captured_tensor_is_refused_if_it_has_a_gradient_to_lose(way: str) -> None:
    x = torch.ones(2)
    closed(closing_over(x)[way])(x)
    with pytest.raises(ValueError, match=r"captures the tensor .* whose gradient would be lost"):
        closed(closing_over(W)[way])
    with pytest.raises(ValueError, match="captures the tensor"):
        torch.func.grad(lambda w: closed(closing_over(w)[way])(x)[0].sum())(x)


def test_so_are_the_parameters_of_a_module() -> None:
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"captures the tensor 'weight' \(2, 2\)"):
        closed(lambda x: (linear(x),))
    linear.requires_grad_(False)
    closed(lambda x: (linear(x),))


def test_so_is_a_global_one() -> None:
    with pytest.raises(ValueError, match="uses_a_global captures the tensor 'W'"):
        closed(uses_a_global)
