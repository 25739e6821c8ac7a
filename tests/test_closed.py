"""closed(f) is f under every transform, keeps only its inputs and replays its random numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from budget import one_in
from hypothesis import example, given
from hypothesis import strategies as st
from kernels import check_closed
from moe_cases import assert_each_close, assert_same, normal
from torch import Tensor

from sharding.closed import Lanes, closed, pull_back
from sharding.testing import seeds


def several(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Two results, of other shapes than the arguments, and an argument itself."""
    return (x.exp() @ w).sum(), x * w, w


@pytest.mark.parametrize("lanes", ["vmap", "loop"])
@one_in(20)
@example(2, 1, 0)
@given(st.integers(1, 2), st.integers(1, 2), seeds())
def test_it_is_the_function_under_every_transform(
    lanes: Lanes, rows: int, columns: int, seed: int
) -> None:
    def with_shapes(xs: list[Tensor], f: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        total, product, w = f(*xs)
        return [total.reshape(1), product, w]

    xs = [normal((rows, columns), seed), normal((columns,), seed + 1)]
    check_closed(
        lambda xs: with_shapes(xs, closed(several, lanes)),
        lambda xs: with_shapes(xs, several),
        xs,
        seed,
    )


def positive(x: Tensor) -> tuple[Tensor, ...]:
    """How many entries a lane keeps depends on its numbers."""
    return (x[x > 0].square().sum(),)


def test_lanes_whose_shapes_depend_on_data_run_one_after_another() -> None:
    x = normal((4, 3), 0)
    looped = closed(positive, lanes="loop")
    expected = torch.stack([positive(row)[0] for row in x])
    assert_same(torch.vmap(looped)(x), [expected])
    assert_same(torch.vmap(looped, in_dims=1)(x.T), [expected])
    gradient = torch.vmap(torch.func.grad(lambda row: looped(row)[0]))(x)
    assert_same([gradient], [2 * x.clamp(min=0)])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(closed(positive))(x)


def test_integers_pass_without_derivative() -> None:
    def pick(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[ids].square(), ids + 1, x.argmax()

    x, ids = torch.tensor([3.0, 5.0]), torch.tensor([1, 1, 0])
    y, more, largest = closed(pick)(x, ids)
    assert_same([y, more, largest], pick(x, ids))
    assert torch.equal(
        torch.func.grad(lambda x: closed(pick)(x, ids)[0].sum())(x), x * 2 * (1 + x.argsort())
    )
    tangent = torch.func.jvp(lambda x: closed(pick)(x, ids)[0], (x,), (torch.ones(2),))[1]
    assert tangent.tolist() == [10, 10, 6]


# -- memory and random numbers -------------------------------------------------------------------


def test_nothing_is_kept_but_the_inputs() -> None:
    kept: list[Tensor] = []

    def note(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    def deep(x: Tensor) -> tuple[Tensor]:
        return (x.exp().sin().exp().sin(),)

    for f, others in ((closed(deep), 0), (deep, 2)):
        x = normal((3,), 0).requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            f(x)
        inputs = x.untyped_storage().data_ptr()
        storages = {saved.untyped_storage().data_ptr() for saved in kept}
        assert len(storages - {inputs}) == others


def dropped(x: Tensor) -> tuple[Tensor]:
    return (x * (torch.rand(x.shape) < 0.5),)


def test_random_numbers_replay_and_the_stream_goes_on_as_without() -> None:
    x = torch.ones(64, dtype=torch.float64)
    torch.manual_seed(0)
    expected = [dropped(x)[0], torch.rand(1)]
    torch.manual_seed(0)
    y, pull = torch.func.vjp(lambda x: closed(dropped)(x)[0], x)[:2]
    (dx,) = pull(torch.ones_like(x))
    assert_same([y, torch.rand(1)], expected)
    assert torch.equal(dx, y)
    assert 0 < y.sum() < 64


def test_a_later_call_draws_anew() -> None:
    f, x = closed(dropped), torch.ones(64)
    assert not torch.equal(f(x)[0], f(x)[0])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_lanes_draw_as_vmap_is_told_to(randomness: str) -> None:
    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        y, pull = torch.func.vjp(lambda x: closed(dropped)(x)[0], x)[:2]
        return y, pull(torch.ones_like(x))[0]

    y, dx = torch.vmap(gradient, randomness=randomness)(torch.ones(2, 64))
    assert torch.equal(y, dx)
    assert torch.equal(y[0], y[1]) == (randomness == "same")


# -- captured tensors ----------------------------------------------------------------------------


class Scaled:
    def __init__(self, w: Tensor) -> None:
        self.w = w

    def times(self, x: Tensor) -> tuple[Tensor]:
        return (x * self.w,)

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        return (x * self.w,)


def product(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (x * w,)


def nested(w: Tensor) -> Callable[[Tensor], tuple[Tensor]]:
    def inner(x: Tensor) -> tuple[Tensor]:
        return (x * w,)

    return lambda x: inner(x)


def with_default(w: Tensor) -> Callable[..., tuple[Tensor]]:
    return lambda x, w=w: (x * w,)


def with_keyword(w: Tensor) -> Callable[..., tuple[Tensor]]:
    def f(x: Tensor, *, w: Tensor = w) -> tuple[Tensor]:
        return (x * w,)

    return f


def module(w: Tensor) -> Callable[[Tensor], tuple[Tensor]]:
    linear = torch.nn.Linear(2, 2).requires_grad_(w.requires_grad)
    return lambda x: (linear(x),)


CAPTURE: dict[str, Callable[[Tensor], Any]] = {
    "variable": lambda w: lambda x: (x * w,),
    "list": lambda w: (lambda ws: lambda x: (x * ws[0]["w"],))([{"w": w}]),
    "nested function": nested,
    "partial": lambda w: partial(product, w=w),
    "default": with_default,
    "keyword default": with_keyword,
    "bound method": lambda w: Scaled(w).times,
    "callable object": Scaled,
    "callable object in a variable": lambda w: (lambda f: lambda x: f(x))(Scaled(w)),
    "module": module,
}


@pytest.mark.parametrize("how", CAPTURE)
def test_a_captured_tensor_with_gradient_is_refused_by_name(how: str) -> None:
    with pytest.raises(ValueError, match=r"captures the tensor '(w|weight)' .*right: closed"):
        closed(CAPTURE[how](torch.ones(2, requires_grad=True)))


@pytest.mark.parametrize("how", [how for how in CAPTURE if how != "module"])
def test_a_captured_tensor_under_a_transform_is_refused(how: str) -> None:
    with pytest.raises(ValueError, match="captures the tensor 'w'"):
        torch.func.grad(lambda w: closed(CAPTURE[how](w))(torch.ones(2))[0].sum())(torch.ones(2))


@pytest.mark.parametrize("how", CAPTURE)
def test_a_captured_constant_is_let_through(how: str) -> None:
    f, x = CAPTURE[how](torch.full((2,), 3.0)), torch.ones(2)
    assert_same(closed(f)(x), f(x))


# -- pull_back -----------------------------------------------------------------------------------


def test_pull_back_has_the_same_bits_with_and_without_transforms() -> None:
    def some(x: Tensor, ids: Tensor, unused: Tensor) -> tuple[Tensor, ...]:
        return x[ids].exp(), ids, x.sin()

    xs = normal((3,), 0), torch.tensor([2, 2]), torch.ones(1).double()
    grads = [normal((2,), 1), normal((3,), 2)]
    with torch.no_grad():
        plain = pull_back(some, xs, grads)
    functional = pull_back(some, xs, grads)
    assert_same(plain, functional)
    expected = xs[0].cos() * grads[1]
    expected[2] += xs[0][2].exp() * grads[0].sum()
    assert_each_close(plain, [expected, torch.zeros(1).double()])
