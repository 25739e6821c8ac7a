"""A tensor that a closed function captures would lose its gradient silently, so it is refused.

So is a generator: the numbers that it draws when the function runs again would be others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sharding import Mesh, make_plan, replicated, sharded, simulate
from sharding.captured import Vouched, captured
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
        "a function defined inside": lambda x: (lambda: (x * scale,))(),
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


def test_and_a_global_one_of_a_function_defined_inside() -> None:
    with pytest.raises(ValueError, match="captures the tensor 'W'"):
        closed(lambda x: (lambda: (x * W,))())


def test_what_two_share_is_looked_at_once() -> None:
    class Shared:
        calls = 0

        def __call__(self) -> None: ...

        def __getattribute__(self, name: str) -> Any:
            Shared.calls += name == "__dict__"
            return object.__getattribute__(self, name)

    f: Any = Shared()
    for _ in range(12):
        f = partial(f, f, f)
    assert not list(captured(f))
    assert Shared.calls == 1


def test_who_vouches_for_a_function_is_believed() -> None:
    closed(Vouched(lambda x: (x * W,)))


def of_generator(outside: torch.Generator) -> Any:
    """The shards' gradient, where a block multiplies them by what it draws."""

    def from_outside(view: Tensor, x: Tensor) -> Tensor:
        return (torch.bernoulli(x, generator=outside) * view).sum()

    def from_inside(view: Tensor, x: Tensor, seed: int) -> Tensor:
        own = torch.Generator().manual_seed(seed)
        return (torch.bernoulli(x, generator=own) * view).sum()

    w = torch.ones(8)
    plan = make_plan(w, "dense", {"dense": replicated()}, Mesh())

    def program(comm: Any, *seed: int) -> Tensor | None:
        shard = plan.shard(w, comm).requires_grad_()
        block = from_inside if seed else from_outside
        sharded(block, plan, comm, "recompute")(shard, w / 2, *seed).backward()
        return shard.grad

    return program


def test_a_generator_from_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="from_outside draws from the generator 'outside'"):
        simulate(of_generator(torch.Generator()), Mesh())


def test_a_generator_that_a_block_makes_replays() -> None:
    found = simulate(of_generator(torch.Generator()), Mesh(), [3])[0]
    halves = torch.full((8,), 0.5)
    drawn = torch.bernoulli(halves, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, drawn) and 0 < drawn.sum() < 8


class Config:
    scale = 2.0


scale = torch.ones(2, requires_grad=True)  # which attributes of that name have nothing to do with


def test_an_attribute_is_no_global_of_its_name() -> None:
    config = Config()
    closed(lambda x: (x * config.scale,))


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_so_is_whatever_else_a_module_has(kind: str) -> None:
    module: Any = torch.nn.Sequential(torch.nn.Identity())
    x = torch.ones(2, requires_grad=True)
    if kind == "buffer":
        module[0].register_buffer("found", x)
    else:
        module[0].found = x
    with pytest.raises(ValueError, match="captures the tensor 'found'"):
        closed(lambda x: (module(x),))
