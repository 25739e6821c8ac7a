"""spread and collect: each row to its choices and back, transposes of each other, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from budget import one_in
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_cases import check_closed
from moe_cases import normal
from torch import Tensor

from functional_ep.permute import Order, collect, sort_order, spread
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
