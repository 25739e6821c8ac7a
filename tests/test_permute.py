"""spread, collect, mix: each row to its choices and back, transposes of each other, to the bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from budget import one_in
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_cases import check_closed, mapped
from moe_cases import assert_each_close, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functional_ep.permute import Order, collect, mix, sort_order, spread
from sharding.testing import exact, seeds


class Rows(NamedTuple):
    """The keys by which the choices of ``tokens`` rows are sorted; what follows dim 0 of a row."""

    keys: tuple[int, ...]
    choices: int
    rest: tuple[int, ...]
    seed: int

    @property
    def tokens(self) -> int:
        return len(self.keys) // self.choices

    @property
    def by(self) -> Order:
        return sort_order(torch.tensor(self.keys, dtype=torch.int64))

    @property
    def sources(self) -> list[int]:
        """The row that each sorted choice comes from."""
        places = sorted(range(len(self.keys)), key=lambda i: (self.keys[i], i))
        return [place // self.choices for place in places]


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Rows down to none, of any number of dims."""
    tokens, choices = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    size = tokens * choices
    keys = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size).map(tuple))
    rest = draw(st.sampled_from([(2,), (), (0,), (1, 2)]))
    return Rows(keys, choices, rest, draw(seeds()))


HARD = Rows((2, 0, 1, 2, 0, 0), 2, (2,), 0)  # no permutation of it is its own inverse


def gathered(x: Tensor, case: Rows) -> Tensor:
    return x[torch.tensor(case.sources, dtype=torch.int64)]


def added(y: Tensor, case: Rows) -> Tensor:
    sources = torch.tensor(case.sources, dtype=torch.int64)
    return y.new_zeros(case.tokens, *y.shape[1:]).index_add(0, sources, y)


@example(HARD)
@given(rows())
def test_rows_go_to_their_choices_and_sums_come_back(case: Rows) -> None:
    x = exact((case.tokens, *case.rest), case.seed)
    y = exact((len(case.keys), *case.rest), case.seed + 1)
    assert torch.equal(spread(x, case.by, case.choices), gathered(x, case))
    assert torch.equal(collect(y, case.by, case.choices), added(y, case))
    assert torch.equal(collect(gathered(x, case), case.by, case.choices), case.choices * x)


def test_the_permutation_in_place_of_its_inverse_is_another_map() -> None:
    x = exact((HARD.tokens, *HARD.rest), 0)
    swapped = Order(HARD.by.inverse, HARD.by.order)
    assert not torch.equal(spread(x, swapped, HARD.choices), gathered(x, HARD))
    assert not torch.equal(collect(gathered(x, HARD), swapped, HARD.choices), HARD.choices * x)


@example(HARD)
@given(rows())
def test_each_is_the_transpose_of_the_other(case: Rows) -> None:
    x = exact((case.tokens, *case.rest), case.seed)
    y = exact((len(case.keys), *case.rest), case.seed + 1)
    there = torch.func.vjp(lambda x: spread(x, case.by, case.choices), x)[1](y)[0]
    back = torch.func.vjp(lambda y: collect(y, case.by, case.choices), y)[1](x)[0]
    assert torch.equal(there, added(y, case))
    assert torch.equal(back, gathered(x, case))
    assert (gathered(x, case) * y).sum() == (x * added(y, case)).sum()


@one_in(20)
@example(HARD)
@given(rows())
def test_both_are_closed_under_every_transform(case: Rows) -> None:
    check_closed(
        lambda xs: [spread(xs[0], case.by, case.choices), collect(xs[1], case.by, case.choices)],
        lambda xs: [gathered(xs[0], case), added(xs[1], case)],
        [normal((n, *case.rest), case.seed + n) for n in (case.tokens, len(case.keys))],
    )


@given(st.lists(st.integers(-3, 3)))
def test_the_order_sorts_stably_and_its_inverse_undoes_it(keys: list[int]) -> None:
    order, inverse = sort_order(torch.tensor(keys, dtype=torch.int64))
    assert order.tolist() == sorted(range(len(keys)), key=lambda i: (keys[i], i))
    assert order[inverse].tolist() == inverse[order].tolist() == list(range(len(keys)))


@pytest.mark.parametrize("f", [spread, collect])
def test_another_order_in_each_lane_is_refused(f: Callable[[Tensor, Order], Tensor]) -> None:
    by = Order(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises(ValueError, match="a different order in each lane"):
        torch.vmap(lambda x, by: f(x, Order(*by)), (None, 0))(torch.ones(2, 1), tuple(by))


def weights(case: Rows, numbers: Callable[..., Tensor] = normal) -> Tensor:
    return numbers((case.tokens, case.choices), case.seed + 2)


def mixed(y: Tensor, w: Tensor, case: Rows) -> Tensor:
    return added(y * w.reshape(-1)[case.by.order, None], case)


@example(HARD)
@given(rows())
def test_a_mixture_is_the_weighed_sum_of_each_tokens_rows(case: Rows) -> None:
    y, w = exact((len(case.keys), 2), case.seed), weights(case, exact)
    assert torch.equal(mix(y, w, case.by), mixed(y, w, case))


@one_in(20)
@example(HARD)
@given(rows())
def test_a_mixture_is_closed_under_every_transform(case: Rows) -> None:
    check_closed(
        lambda xs: [mix(xs[0], xs[1], case.by)],
        lambda xs: [mixed(xs[0], xs[1], case)],
        [normal((len(case.keys), 2), case.seed), weights(case)],
    )


DIMS = [dims for dims in itertools.product([None, 0, 1, -1], repeat=2) if dims != (None, None)]


@pytest.mark.parametrize("dims", DIMS)
def test_rows_or_weights_of_a_mixture_may_be_mapped(dims: tuple[int | None, int | None]) -> None:
    pair = normal((len(HARD.keys), 2), 0), weights(HARD)
    xs = [mapped(x, dim, 2) for x, dim in zip(pair, dims, strict=True)]
    found = torch.vmap(lambda y, w: mix(y, w, HARD.by), dims)(*xs)
    assert_each_close([found], [torch.vmap(lambda y, w: mixed(y, w, HARD), dims)(*xs)])


class Rowwise(TorchDispatchMode):
    """The most rows of any new tensor that operations return."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        result = func(*args, **(kwargs or {}))
        for y in tree_leaves(result):
            new = isinstance(y, Tensor) and y.untyped_storage().data_ptr() not in known
            if new and y.is_floating_point() and y.dim() > 1:
                self.most = max(self.most, math.prod(y.shape[:-1]))
        return result


def most_rows(f: Callable[[], Tensor]) -> int:
    with Rowwise() as seen:
        f()
    return seen.most


def test_sums_come_back_without_a_row_for_every_choice() -> None:
    case = Rows(tuple(range(12)), 4, (2,), 0)
    y, w = normal((12, 2), 0), weights(case)
    assert most_rows(lambda: collect(y, case.by, 4)) == most_rows(lambda: mix(y, w, case.by)) == 3
    assert most_rows(lambda: mixed(y, w, case)) == 12
