"""T9: where the views are gathered and how long they are kept changes no bit of any derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from blocks import (
    EVERY,
    FIRST,
    SECOND,
    Model,
    Tensors,
    by_autograd,
    by_grad_and_value,
    by_jvp_of_grad,
    by_vjp,
    loss,
    models,
)
from budget import one_in, real
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st

import sharding.closed
from sharding import Comm, Mesh, partition, simulate, zero3
from sharding.buffers import SMALL

WIDTH = math.isqrt(SMALL // 4)  # of the smallest float32 weight whose view is pooled


def program(comm: Comm, model: Model, derivative: Any, how: Sequence[Any]) -> list[Tensors]:
    """One derivative by every granularity and mode, from the same random numbers."""
    plan, x, results = model.plan(), model.data(comm.rank), []
    for granularity, mode in how:
        torch.manual_seed(model.seed + comm.rank)
        shards, u = plan.shard(model.params(), comm), plan.shard(model.params(1), comm)
        f = loss(granularity, mode, plan, comm, model)
        results.append([y.detach() for y in derivative(f, shards, x.clone(), u)])
    return results


def check_granularity(model: Model, derivative: Any, ranks: Any = simulate) -> None:
    """T9: whole = composed = chain and keep = regather = recompute, bit by bit."""
    per_rank = [[a] * model.mesh.size for a in (model, derivative, EVERY)]
    for rank, results in enumerate(ranks(program, model.mesh, *per_rank)):
        for how, found in zip(EVERY, results, strict=True):
            for i, (a, b) in enumerate(zip(found, results[0], strict=True)):
                what = f"T9: {derivative.__name__} of {how} and {EVERY[0]}, result {i}"
                assert torch.equal(a, b), f"{what} on rank {rank} of {model}: {a}, {b}"


@pytest.mark.parametrize("derivative", FIRST)
@one_in(10)
@given(model=models(smooth=True))
def test_no_bit_of_a_gradient_depends_on_where_and_when(derivative: Any, model: Model) -> None:
    check_granularity(model, derivative)


@pytest.mark.parametrize("derivative", SECOND)
@one_in(10)
@given(model=models(smooth=False))
def test_second_derivatives_are_the_same(derivative: Any, model: Model) -> None:
    check_granularity(model, derivative)


@pytest.mark.parametrize("derivative", [by_autograd, by_grad_and_value, by_jvp_of_grad])
@real(20)
@given(data=st.data())
def test_the_same_on_real_ranks(ranks2: Farm, derivative: Any, data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from([Mesh(ep=2), Mesh(edp=2, ep=1)]))
    check_granularity(data.draw(models(True, mesh)), derivative, ranks2.run)


@pytest.mark.parametrize("derivative", [by_autograd, by_vjp])
def test_the_same_where_buffers_are_used_again(ranks2: Farm, derivative: Any) -> None:
    model = Model(Mesh(ep=2), zero3("ep"), zero3("ep"), 3, WIDTH, 0.5, True, 1)
    check_granularity(model, derivative, ranks2.run)


@pytest.mark.parametrize("derivative", SECOND)
@one_in(10)
@given(data=st.data())
def test_they_are_those_of_the_plain_sum_over_all_ranks(
    derivative: Any, data: st.DataObject
) -> None:
    drawn = data.draw(models(smooth=False))
    zero = zero3(*drawn.mesh.axes)
    model = drawn._replace(weight=zero, scale=zero, dropout=0.0)
    rows = [model.data(rank) for rank in model.mesh]

    def plain(comm: Comm) -> Tensors:
        f = loss("plain", "keep", model.plan(), comm, model)
        return derivative(f, model.params(), torch.cat(rows), model.params(1))

    (expected,) = simulate(plain, Mesh())
    per_rank = [[a] * model.mesh.size for a in (model, derivative, EVERY)]
    for rank, results in enumerate(simulate(program, model.mesh, *per_rank)):
        for found in results:
            for a, b in zip(found, expected, strict=True):
                if a.dim() == 1:
                    assert torch.equal(a, partition(zero, model.mesh, rank, b))


def test_random_numbers_that_are_drawn_anew_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Mesh(ep=2), zero3("ep"), zero3("ep"), 2, 4, 0.5, True, 1)
    check_granularity(model, by_vjp)
    again = sharding.closed._Replayed
    monkeypatch.setattr(again, "__call__", lambda self, *xs: self.f(*xs))
    with pytest.raises(AssertionError, match=r"T9: by_vjp of \('whole', 'recompute'\)"):
        check_granularity(model, by_vjp)
