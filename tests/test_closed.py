"""closed(f) = f, as one node of the graph that keeps only its inputs, under every transform."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transforms
from budget import one_in
from hypothesis import given
from moe_cases import assert_each_close, assert_same, normal
from torch import Tensor
from transforms import Leaves

from sharding.closed import _Replayed, closed, pull_back
from sharding.testing import exact, seeds

LANES = ("vmap", "loop")


def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """A function with second and third derivatives, and with an integer among its results."""
    y = x @ w
    return y * y * x, (x > 0).sum(), (y * w).sum(0)


def floating(ys: tuple[Tensor, ...]) -> Leaves:
    return [y for y in ys if y.is_floating_point()]


def derivatives(g: transforms.F, x: Leaves, u: Leaves, v: Leaves) -> dict[str, Any]:
    results: dict[str, Any] = {k: t(g, x, u, v) for k, (_, t) in transforms.SHARED.items()}
    return results | transforms.local_matrices(g, x) | transforms.plain_autograd(g, x, u, v)


def flat(tree: Any) -> Leaves:
    return [tree] if isinstance(tree, Tensor) else [x for branch in tree for x in flat(branch)]


def check_closed(lanes: Any, seed: int) -> None:
    """Every transform of closed(f) is that of f, bit by bit."""
    x, u, v = ([exact((2,), seed + i), exact((2, 2), seed + 10 + i)] for i in range(3))
    v = [v[0], v[0]]
    found = derivatives(lambda xs: floating(closed(f, lanes)(*xs)), x, u, v)
    expected = derivatives(lambda xs: floating(f(*xs)), x, u, v)
    for name, result in found.items():
        for a, b in zip(flat(result), flat(expected[name]), strict=True):
            assert torch.equal(a, b), f"{name} of closed(f, {lanes!r}): {a}, of f: {b}"


@pytest.mark.parametrize("lanes", LANES)
@one_in(20)
@given(seed=seeds())
def test_every_transform_of_a_closed_function_is_that_of_the_function(
    lanes: Any, seed: int
) -> None:
    check_closed(lanes, seed)


def test_only_the_inputs_are_kept() -> None:
    def wide(x: Tensor) -> tuple[Tensor, ...]:
        return ((x.expand(1000, -1).exp().sin() * x).sum(0),)

    x = torch.ones(3, requires_grad=True)
    kept: dict[str, list[int]] = {"plain": [], "closed": []}
    for name, function in (("plain", wide), ("closed", closed(wide))):

        def pack(saved: Tensor, name: str = name) -> Tensor:
            kept[name].append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            function(x)
    assert max(kept["plain"]) == 3000 and kept["closed"] == [3]


def test_an_output_may_be_an_input() -> None:
    x = torch.ones(3, requires_grad=True)
    y, same = closed(lambda x: (2 * x, x))(x)
    assert torch.equal(torch.autograd.grad([y, same], x, [y.detach(), y.detach()])[0], 3 * y)


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


# -- random numbers ------------------------------------------------------------------------------

DERIVATIVES = ("value", "vjp", "jvp", "jvp of grad", "grad of grad", "jvp of jvp", "grad of jvp")


def dropped(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.nn.functional.dropout(x * x * x),)


def check_replay(name: str) -> None:
    """A derivative sees the random numbers of the value, and moves the stream as the value does."""
    x, u, v = ([exact((16,), i)] for i in range(3))
    found: list[Leaves] = []
    for function in (dropped, closed(dropped)):
        torch.manual_seed(0)
        results = transforms.SHARED[name][1](lambda xs, g=function: list(g(*xs)), x, u, v)
        found.append([*results, torch.rand(3)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b), f"{name}: {b} of the closed function, not {a}"


@pytest.mark.parametrize("name", DERIVATIVES)
def test_random_numbers_replay(name: str) -> None:
    check_replay(name)


def test_random_numbers_that_do_not_replay_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Replayed, "__call__", lambda self, *xs: self.f(*xs))
    with pytest.raises(AssertionError, match="vjp"):
        check_replay("vjp")


def test_a_later_call_draws_anew() -> None:
    f, x = closed(dropped), torch.ones(64)
    assert not torch.equal(f(x)[0], f(x)[0])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_lanes_draw_as_vmap_is_told_to(randomness: str) -> None:
    def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        y, pull = torch.func.vjp(lambda x: closed(dropped)(x)[0], x)[:2]
        return y, pull(torch.ones_like(x))[0]

    y, dx = torch.vmap(gradient, randomness=randomness)(torch.ones(2, 64))
    assert torch.equal(3 * y, dx)  # of the cube of one
    assert torch.equal(y[0], y[1]) == (randomness == "same")


def gradient_under_autocast(function: Any, inside: bool) -> Tensor:
    """The value is computed under autocast, or the backward pass is."""
    x, w = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        (y,) = function(x, w)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        return torch.autograd.grad(y.float().square().sum(), x)[0]


@pytest.mark.parametrize("inside", [True, False])
def test_what_was_cast_is_cast_again(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (torch.tanh(x @ w) @ w,)

    expected = gradient_under_autocast(multiply, inside)
    assert torch.equal(gradient_under_autocast(closed(multiply), inside), expected)
    monkeypatch.setattr("sharding.closed._casting", lambda casts: nullcontext())
    assert not torch.equal(gradient_under_autocast(closed(multiply), inside), expected)


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
