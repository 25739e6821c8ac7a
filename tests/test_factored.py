"""Factored: the gradient that it stands for, whichever way it is looked at."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import normal
from torch import Tensor
from torch.utils._pytree import tree_leaves

from functional_ep import adamw, init_state, lm, make_train_step
from functional_ep.factored import FACTORS, PIECE, Factored
from functional_ep.grouped import grouped_mm, grouped_outer
from functional_ep.norm import local_squares
from sharding import Comm, Mesh, expert_parallel, make_plan, simulate, zero3
from sharding.closed import closed
from sharding.node import accept
from sharding.plan import Copy
from sharding.testing import seeds


class Factors(NamedTuple):
    """Rows of each expert, out and in of each row."""

    counts: tuple[int, ...]
    out: int
    wide: int
    seed: int

    def rows(self, width: int, salt: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return normal((sum(self.counts), width), self.seed + salt).to(dtype)

    def both(self, dtype: torch.dtype = torch.float64) -> tuple[Factored, Tensor]:
        """In factors, and multiplied out."""
        g, x = self.rows(self.out, 1, dtype), self.rows(self.wide, 2, dtype)
        return Factored.of(g, x, self.counts), grouped_outer(g, x, self.counts)


@st.composite
def factors(draw: st.DrawFn) -> Factors:
    counts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    size = st.sampled_from([1, 2, 7, 64])
    return Factors(tuple(counts), draw(size), draw(size), draw(seeds()))


LARGE = Factors((3, 0, 5), 520, 520, 0)  # a matrix has more entries than a piece
MADE = Factors((40, 0, 1), 16, 16, 0)  # so many rows that a product is made at once


@given(factors())
def test_every_operation_sees_the_gradient(case: Factors) -> None:
    found, right = case.both()
    assert torch.equal(found.dense(), right)
    assert torch.equal(found + 0, right)
    assert torch.equal(found.flatten() * 2, right.flatten() * 2)
    assert isinstance(found.view(-1), Factored) and found.shape == right.shape
    assert found.untyped_storage().nbytes() == 0  # it would be counted as memory


@pytest.mark.parametrize("case", [LARGE, MADE, Factors((0, 0), 8, 8, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_have_each_entry_once(case: Factors, dtype: torch.dtype) -> None:
    found, right = case.both(dtype)
    assert PIECE < 520 * 520
    seen, values = torch.zeros(right.numel()), torch.full_like(right.flatten(), torch.nan)
    times, places = seen.split(found.cuts()), values.split(found.cuts())
    for pieces in found.pieces():
        for number, part in pieces:
            times[number].add_(1)
            places[number].copy_(part)
    assert bool((seen == 1).all())
    torch.testing.assert_close(values, right.flatten(), rtol=1e-5, atol=1e-5)


def squares(g: Tensor, counts: bool) -> Tensor:
    return simulate(lambda comm: local_squares([g], [Copy((), counts)], comm), Mesh())[0]


@given(factors())
def test_the_norm_needs_no_product(case: Factors) -> None:
    found, right = case.both(torch.float32)
    expected = right.double().square().sum()
    torch.testing.assert_close(squares(found, True), expected, rtol=1e-5, atol=1e-12)
    assert squares(found, False) == 0


def test_a_norm_that_cancels_is_multiplied_out() -> None:
    g, x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[1.0, 1e-4], [1.0, 0.0]])
    found = Factored.of(g, x, [2])
    rows = (g @ g.t()).double() * (x @ x.t())
    assert rows.sum() != pytest.approx(1e-8, rel=1e-3)  # what the short way would say
    assert float(found.squares()) == pytest.approx(1e-8, rel=1e-6)


@pytest.mark.parametrize("large", [1e25, 1e-25])
def test_factors_that_cannot_be_squared_have_a_norm(large: float) -> None:
    found = Factored.of(torch.full((2, 3), large), torch.full((2, 4), 1 / large), [2])
    assert float(found.squares()) == pytest.approx(3 * 4 * 2**2, rel=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_shows_in_the_norm(bad: float) -> None:
    g, x = torch.ones(2, 3), torch.ones(2, 3)
    g[1, 1] = bad
    assert not bool(Factored.of(g, x, [1, 1]).squares().isfinite())


@pytest.mark.parametrize(
    "case", [LARGE, MADE, Factors((0, 2, 1), 24, 40, 1), Factors((2, 0), 7, 5, 2)]
)
@pytest.mark.parametrize("factor", [None, 0.3])
def test_adamw_takes_the_same_step(case: Factors, factor: float | None) -> None:
    found, right = case.both(torch.float32)
    scale = None if factor is None else torch.tensor(factor, dtype=torch.float64)

    def stepped(gradient: Tensor) -> list[Tensor]:
        p = normal(tuple(right.shape), 9).float().view(-1)
        optimizer = adamw(1e-2, weight_decay=0.1)
        moments = {k: [v["p"]] for k, v in optimizer.init({"p": p}).items()}
        (new,), after = optimizer.update(
            torch.tensor(0), [p], [gradient.view(-1)], moments, False, scale
        )
        return [new, *(after[name][0] for name in sorted(after))]

    for mine, theirs in zip(stepped(found), stepped(right), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)
    wrong = stepped(right * 1.01)
    assert not torch.allclose(wrong[1], stepped(found)[1], rtol=2e-5, atol=1e-6)


def test_only_a_leaf_that_takes_factors_gets_them() -> None:
    x, w = normal((4, 32), 1), normal((4, 32, 32), 2).flatten().requires_grad_()

    def gradient() -> Tensor:
        y = grouped_mm(x, w.view(4, 32, 32), [1, 2, 0, 1])
        return torch.autograd.grad(y.square().sum(), w)[0]

    plain = gradient()
    edge = accept(w, FACTORS)
    in_factors = gradient()
    assert isinstance(in_factors, Factored) and not isinstance(plain, Factored)
    assert torch.equal(in_factors.dense(), plain)
    del edge
    assert not isinstance(gradient(), Factored)


def test_weights_used_twice_add_up() -> None:
    x, y, w = normal((4, 32), 1), normal((4, 32), 3), normal((4, 32, 32), 2).requires_grad_()

    def gradient() -> Tensor:
        z = grouped_mm(x, w, [1, 2, 0, 1]) + grouped_mm(y, w, [0, 0, 4, 0])
        return torch.autograd.grad(z.square().sum(), w)[0]

    plain = gradient()
    edge = accept(w, FACTORS)
    assert torch.equal(gradient(), plain)
    del edge


def test_a_closed_function_leaves_them_in_factors() -> None:
    x, w = normal((4, 32), 1), normal((4, 32, 32), 2).flatten().requires_grad_()
    layer = closed(lambda x, w: (grouped_mm(x, w, [1, 2, 0, 1]).sin(),))
    twice = closed(lambda x, w: layer(x, w.view(4, 32, 32)))

    def gradient() -> Tensor:
        return torch.autograd.grad(twice(x, w)[0].square().sum(), w)[0]

    plain = gradient()
    edge = accept(w, FACTORS)
    in_factors = gradient()
    assert isinstance(in_factors, Factored) and not isinstance(plain, Factored)
    assert torch.equal(in_factors.dense(), plain)
    del edge


def test_it_is_not_written_into() -> None:
    found, _ = LARGE.both()
    with pytest.raises(TypeError, match="read, and not written"):
        found.add_(1)


CFG = lm.Config(vocab=64, dim=32, layers=2, heads=2, ffn=32, experts=8, top_k=2)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


def stepped(comm: Comm, in_factors: bool, microbatches: int) -> tuple[Any, Any]:
    plan = make_plan(lm.init(CFG), lm.labels, RULES, comm.mesh)
    optimizer = adamw(1e-2, weight_decay=0.1)._replace(factored=in_factors)
    seen: list[str] = []

    def update(step: Tensor, params: Any, grads: Any, *rest: Any) -> Any:
        seen.extend(type(g).__name__ for g in grads)
        return optimizer.update(step, params, grads, *rest)

    watched = optimizer._replace(update=update)
    step = make_train_step(lm.loss(CFG, plan, comm), plan, watched, comm, clip=0.5)
    state = init_state(plan.shard(lm.init(CFG), comm), plan, watched)
    for _ in range(2):
        ids = normal((1, 8), comm.rank).abs().mul(20).long() % CFG.vocab
        batch = {"input_ids": ids, "labels": ids}
        state, metrics = step(state, *([batch] * microbatches))
    assert ("Factored" in seen) == (in_factors and microbatches == 1 and comm.mesh["edp"] == 1)
    return state, metrics


@pytest.mark.parametrize("mesh", [Mesh(edp=1, ep=1), Mesh(edp=1, ep=2), Mesh(edp=2, ep=2)])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_is_the_same(mesh: Mesh, microbatches: int) -> None:
    ranks = range(mesh.size)
    mine = simulate(stepped, mesh, [True for _ in ranks], [microbatches for _ in ranks])
    plain = simulate(stepped, mesh, [False for _ in ranks], [microbatches for _ in ranks])
    for a, b in zip(tree_leaves(mine), tree_leaves(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
