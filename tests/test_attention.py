"""attention: causal softmax over rotated keys, head by head, under every transform."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from budget import one_in
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_cases import check_autograd, check_transforms
from moe_cases import assert_each_close, normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from functional_ep.attention import attention, mask_bias, rotary_table, rotate
from sharding.testing import seeds

THETA = 100.0


class Sizes(NamedTuple):
    """Sequences, positions, heads, pairs of channels per head; which tokens are no padding."""

    sequences: int
    positions: int
    heads: int
    pairs: int
    mask: tuple[bool, ...] | None
    seed: int

    @property
    def dim(self) -> int:
        return self.heads * 2 * self.pairs

    @property
    def leaves(self) -> list[Tensor]:
        d = self.dim
        shapes = (self.sequences, self.positions, d), (3 * d, d), (d, d)
        return [normal(shape, self.seed + i) for i, shape in enumerate(shapes)]

    @property
    def bias_B1SS(self) -> Tensor | None:
        return None if self.mask_BS is None else mask_bias(self.mask_BS, torch.float64)

    @property
    def mask_BS(self) -> Tensor | None:
        if self.mask is None:
            return None
        mask = torch.tensor(self.mask, dtype=torch.bool)
        return mask.view(self.sequences, self.positions)


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """No sequence and no position among them."""
    sequences, positions = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    heads, pairs = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    size = sequences * positions
    mask = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size).map(tuple))
    return Sizes(sequences, positions, heads, pairs, mask, draw(seeds()))


HARD = Sizes(2, 3, 2, 2, (True, False, True, False, True, True), 0)


def library(case: Sizes, leaves: list[Tensor]) -> Tensor:
    table = rotary_table(case.positions, 2 * case.pairs, THETA)
    x, qkv, out = leaves
    return attention(x, qkv, out, case.heads, table, case.bias_B1SS)


def naive(case: Sizes, leaves: list[Tensor]) -> Tensor:
    """Query by query, over the keys that it may see."""
    x, qkv, out = leaves
    mask, channels = case.mask_BS, 2 * case.pairs
    rows: list[Tensor] = []
    for b in range(case.sequences):
        for s in range(case.positions):
            seen = [t for t in range(s + 1) if mask is None or bool(mask[b, t]) or t == s]
            heads: list[Tensor] = []
            for h in range(case.heads):
                part = slice(h * channels, (h + 1) * channels)
                w_q, w_k, w_v = (w[part] for w in qkv.chunk(3))
                q = turn(w_q @ x[b, s], s)
                keys = torch.stack([turn(w_k @ x[b, t], t) for t in seen])
                values = torch.stack([w_v @ x[b, t] for t in seen])
                heads.append((keys @ q / math.sqrt(channels)).softmax(0) @ values)
            rows.append(out @ torch.cat(heads))
    return torch.stack(rows).view(x.shape) if rows else 0 * x @ out


def turn(x: Tensor, position: int) -> Tensor:
    """Channel c and c + C/2 are a complex number; it is turned by its angle."""
    a, b = x.chunk(2)
    half = len(a)
    angles = x.new_tensor([position * THETA ** (-c / half) for c in range(half)])
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


@example(HARD)
@given(sizes())
def test_values_and_gradients_are_those_of_each_query_alone(case: Sizes) -> None:
    y, pull = torch.func.vjp(lambda xs: library(case, xs), case.leaves)[:2]
    expected, pull_naive = torch.func.vjp(lambda xs: naive(case, xs), case.leaves)[:2]
    g = normal(tuple(y.shape), case.seed + 4)
    assert_each_close([y, *pull(g)[0]], [expected, *pull_naive(g)[0]])


@pytest.mark.parametrize("mask", [None, (False, True)])
# Lanes of a pull-back run one by one: torch batches the backward pass of fused attention in a loop.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_it_is_closed_under_every_transform(mask: tuple[bool, ...] | None) -> None:
    case = Sizes(1, 2, 1, 1, mask, 0)
    functions = partial(_listed, library, case), partial(_listed, naive, case)
    check_transforms(*functions, case.leaves)
    with sdpa_kernel(SDPBackend.MATH):  # fused, it has no second derivative
        check_autograd(*functions, case.leaves)


def _listed(f: Callable[..., Tensor], case: Sizes, leaves: list[Tensor]) -> list[Tensor]:
    return [f(case, leaves)]


def without_rotation(case: Sizes) -> Tensor:
    cos, sin = rotary_table(case.positions, 2 * case.pairs, THETA)
    x, qkv, out = case.leaves
    table = torch.ones_like(cos), torch.zeros_like(sin)
    return attention(x, qkv, out, case.heads, table, case.bias_B1SS)


def without_mask(case: Sizes) -> Tensor:
    return library(case._replace(mask=None), case.leaves)


def heads_interleaved(case: Sizes) -> Tensor:
    x, qkv, out = case.leaves
    order = torch.arange(case.dim).view(case.heads, -1).T.flatten()
    qkv = qkv.view(3, case.dim, case.dim)[:, order].reshape(qkv.shape)
    return library(case, [x, qkv, out[:, order]])


@pytest.mark.parametrize("wrong", [without_rotation, without_mask, heads_interleaved])
def test_another_attention_is_rejected(wrong: Callable[[Sizes], Tensor]) -> None:
    with pytest.raises(AssertionError):
        assert_each_close([wrong(HARD)], [naive(HARD, HARD.leaves)])


@one_in(2)
@given(seeds(), st.integers(0, 5), st.integers(1, 3))
def test_products_of_rotated_vectors_depend_on_distance_alone(
    seed: int, shift: int, pairs: int
) -> None:
    q, k = normal((2 * pairs,), seed), normal((2 * pairs,), seed + 1)
    table = rotary_table(9, 2 * pairs, THETA)

    def at(x: Tensor, position: int) -> Tensor:
        return rotate(x.expand(1, 1, 9, -1), table)[0, 0, position]

    assert_each_close([at(q, 3 + shift) @ at(k, shift)], [at(q, 3) @ at(k, 0)])
    assert_each_close([at(q, shift).norm()], [q.norm()])
    assert abs(at(q, 4) @ at(k, 0) - at(q, 3) @ at(k, 0)) > 1e-9
