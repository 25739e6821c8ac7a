"""Grouped products: one per expert, closed under every transform, each result written once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from budget import one_in
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_cases import check_closed, mapped
from moe_cases import assert_each_close, normal
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functional_ep.grouped import grouped_mm, grouped_outer
from sharding.testing import exact, seeds


class Groups(NamedTuple):
    """Rows of each expert, in and out of each row."""

    counts: tuple[int, ...]
    wide: int
    out: int
    seed: int

    def rows(self, width: int, salt: int, numbers: Any = normal) -> Tensor:
        return numbers((sum(self.counts), width), self.seed + salt)

    def weights(self, numbers: Any = normal) -> Tensor:
        return numbers((len(self.counts), self.out, self.wide), self.seed)

    @property
    def expert_RE(self) -> Tensor:
        """One for the expert of a row, zero for the others."""
        ids = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        return torch.nn.functional.one_hot(ids, len(self.counts)).double()


@st.composite
def groups(draw: st.DrawFn) -> Groups:
    """Experts with and without rows, and no row at all."""
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple))
    return Groups(counts, draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(seeds()))


def dense_mm(x: Tensor, w: Tensor, case: Groups) -> Tensor:
    return torch.einsum("ri,eoi,re->ro", x, w, case.expert_RE)


def dense_outer(g: Tensor, x: Tensor, case: Groups) -> Tensor:
    return torch.einsum("ro,ri,re->eoi", g, x, case.expert_RE)


@given(groups())
def test_products_are_those_of_each_expert_to_the_bit(case: Groups) -> None:
    x, g, w = case.rows(case.wide, 1, exact), case.rows(case.out, 2, exact), case.weights(exact)
    assert torch.equal(grouped_mm(x, w, case.counts), dense_mm(x, w, case))
    assert torch.equal(grouped_outer(g, x, case.counts), dense_outer(g, x, case))


@one_in(20)
@example(Groups((2, 0, 1), 2, 3, 0))
@given(groups())
def test_grouped_mm_is_closed_under_every_transform(case: Groups) -> None:
    check_closed(
        lambda xs: [grouped_mm(xs[0], xs[1], case.counts)],
        lambda xs: [dense_mm(xs[0], xs[1], case)],
        [case.rows(case.wide, 1), case.weights()],
    )


@one_in(20)
@example(Groups((2, 0, 1), 2, 3, 0))
@given(groups())
def test_grouped_outer_is_closed_under_every_transform(case: Groups) -> None:
    check_closed(
        lambda xs: [grouped_outer(xs[0], xs[1], case.counts)],
        lambda xs: [dense_outer(xs[0], xs[1], case)],
        [case.rows(case.out, 1), case.rows(case.wide, 2)],
    )


@st.composite
def kernel_groups(draw: st.DrawFn) -> Groups:
    """Rows that begin at multiples of 16 bytes, and some that do not."""
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple))
    wide, out = (draw(st.sampled_from([4, 6, 8, 16])) for _ in range(2))
    return Groups(counts, wide, out, draw(seeds()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(kernel_groups(), st.booleans(), st.integers(0, 1))
def test_the_grouped_kernel_is_one_product_per_expert(
    dtype: torch.dtype, case: Groups, is_transposed: bool, start: int
) -> None:
    """Whatever the layout: rows in the middle of others, matrices stored the other way round."""
    x, g, w = (
        torch.nn.functional.pad(t.to(dtype), (start, 0))[..., start:]
        for t in (case.rows(case.wide, 1), case.rows(case.out, 2), case.weights())
    )
    if is_transposed:
        w = w.mT.contiguous().mT
    xs, gs = x.split(case.counts), g.split(case.counts)
    products = [x_e @ w_e.T for x_e, w_e in zip(xs, w, strict=True)]
    outers = [g_e.T @ x_e for g_e, x_e in zip(gs, xs, strict=True)]
    found = grouped_mm(x, w, case.counts), grouped_outer(g, x, case.counts)
    eps = torch.finfo(dtype).eps
    for y, right in zip(found, (torch.cat(products), torch.stack(outers)), strict=True):
        torch.testing.assert_close(y, right, rtol=2 * eps, atol=8 * eps)


def test_tangents_pass_where_no_gradient_is_recorded() -> None:
    case = Groups((2, 1), 2, 3, 0)
    x, dx, w = case.rows(2, 1), case.rows(2, 2), case.weights()
    with forward_ad.dual_level(), torch.no_grad():
        y = forward_ad.unpack_dual(grouped_mm(forward_ad.make_dual(x, dx), w, case.counts))
        assert y.tangent is not None
        assert torch.equal(y.tangent, grouped_mm(dx, w, case.counts))


DIMS = [dims for dims in itertools.product([None, 0, 1, -1], repeat=2) if dims != (None, None)]


@pytest.mark.parametrize("dims", DIMS)
@one_in(6)
@given(groups(), st.integers(1, 3))
def test_any_arguments_may_be_mapped_along_any_dim(
    dims: tuple[int | None, int | None], case: Groups, lanes: int
) -> None:
    x, g, w = case.rows(case.wide, 1), case.rows(case.out, 2), case.weights()
    for f, dense, pair in (
        (grouped_mm, dense_mm, (x, w)),
        (grouped_outer, dense_outer, (g, x)),
    ):
        xs = [mapped(a, dim, lanes) for a, dim in zip(pair, dims, strict=True)]
        products = partial(f, counts=case.counts), partial(dense, case=case)
        found, expected = (torch.vmap(product, dims)(*xs) for product in products)
        assert_each_close([found], [expected])
        found, expected = (torch.vmap(gradient(product), dims)(*xs) for product in products)
        assert_each_close(found, expected)


def gradient(product: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return torch.func.grad(lambda *pair: product(*pair).sin().sum(), argnums=(0, 1))


COARSER = {
    torch.float64: torch.float32,
    torch.float32: torch.bfloat16,
    torch.bfloat16: torch.float8_e5m2,
}


@pytest.mark.parametrize("dtype", COARSER)
def test_products_keep_the_digits_of_their_dtype(dtype: torch.dtype) -> None:
    case = Groups((5, 0, 7), wide=16, out=8, seed=0)
    xs = case.rows(16, 1), case.weights(), case.rows(8, 2)

    def outcome(rounded: torch.dtype, grouped: bool) -> list[Tensor]:
        x, w, g = (a.to(rounded).to(dtype) for a in xs)
        if not grouped:
            x, w, g = x.double(), w.double(), g.double()
            return [dense_mm(x, w, case), dense_mm(g, w.mT, case), dense_outer(g, x, case)]
        y, pull = torch.func.vjp(lambda x, w: grouped_mm(x, w, case.counts), x, w)[:2]
        return [y, *pull(g)]

    def error(found: Tensor, expected: Tensor) -> float:
        return float((found.double() - expected).abs().max() / expected.abs().max())

    allowed, right = 4 * torch.finfo(dtype).eps, outcome(dtype, grouped=False)
    for found, expected in zip(outcome(dtype, grouped=True), right, strict=True):
        assert found.dtype == dtype and error(found, expected) < allowed
    for coarse, expected in zip(outcome(COARSER[dtype], grouped=True), right, strict=True):
        assert error(coarse, expected) > allowed


@pytest.mark.parametrize("counts", [(1, 1), (3, 0), (2,), (1, 1, 0), ()])
def test_counts_that_do_not_fit_are_refused(counts: tuple[int, ...]) -> None:
    x, w = torch.ones(2, 3), torch.ones(2, 4, 3)
    if counts != (1, 1):
        with pytest.raises(ValueError, match=r"grouped_mm: counts \(.*\) for 2 rows and 2 experts"):
            grouped_mm(x, w, counts)
    with pytest.raises(ValueError, match=r"grouped_outer: counts \(.*\) for 3 and 2 rows"):
        grouped_outer(torch.ones(3, 4), x, counts)


class Costs(TorchDispatchMode):
    """New memory that operations return, in bytes, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket is torch.ops.aten.mm
        for y in tree_leaves(result):
            if isinstance(y, Tensor) and y.untyped_storage().data_ptr() not in known:
                self.bytes += y.untyped_storage().nbytes()
        return result


def costs(product: Any, experts: int, counts: tuple[int, ...]) -> Costs:
    """Of a forward and a backward pass; experts without counts are idle."""
    counts = counts + (0,) * (experts - len(counts))
    x = normal((sum(counts), 16), 0).requires_grad_()
    w = normal((experts, 8, 16), 1).requires_grad_()
    g = normal((sum(counts), 8), 2)
    with Costs() as found:
        torch.autograd.grad(product(x, w, counts), [x, w], g)
    return found


def loop_by_index(x: Tensor, w: Tensor, counts: tuple[int, ...]) -> Tensor:
    rows = x.split(counts)
    return torch.cat([x_e @ w[e].T for e, x_e in enumerate(rows)])


def test_each_result_is_one_tensor_written_once() -> None:
    counts = (2,) * 64
    results = 8 * (128 * 8 + 128 * 16 + 64 * 8 * 16)
    assert costs(grouped_mm, 64, counts).bytes == results
    assert costs(loop_by_index, 64, counts).bytes > 64 * 8 * (64 * 8 * 16)


def test_an_idle_expert_costs_nothing_but_its_zero_gradient() -> None:
    few, many = (costs(grouped_mm, experts, (3, 4)) for experts in (2, 64))
    assert few.products == many.products == 3 * 2
    assert many.bytes - few.bytes == 62 * 8 * (8 * 16)
    assert costs(loop_by_index, 64, (3, 4)).products > 3 * 2
