"""Products in few shapes: those of each expert alone, whatever is computed along with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_cases import normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functional_ep import few_shapes
from functional_ep.few_shapes import rounded
from functional_ep.grouped import grouped_mm, grouped_outer
from sharding.testing import seeds

WIDE, OUT = 32, 24
Counts = tuple[int, ...]
COUNTS = st.lists(st.integers(0, 70), min_size=1, max_size=5).map(tuple)
DTYPES = [torch.bfloat16, torch.float16]


def operands(counts: Counts, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = sum(counts)
    x, g = normal((rows, WIDE), seed), normal((rows, OUT), seed + 1)
    return x.to(dtype), g.to(dtype), normal((len(counts), OUT, WIDE), seed + 2).to(dtype)


def check(counts: Counts, seed: int, dtype: torch.dtype) -> None:
    """Both products are those of each expert in double precision, rounded."""
    x, g, w = operands(counts, seed, dtype)
    xs, gs = x.double().split(counts), g.double().split(counts)
    y = torch.cat([x_e @ w_e.T for x_e, w_e in zip(xs, w.double(), strict=True)])
    o = torch.stack([g_e.T @ x_e for g_e, x_e in zip(gs, xs, strict=True)])
    eps = torch.finfo(dtype).eps
    for found, right in ((grouped_mm(x, w, counts), y), (grouped_outer(g, x, counts), o)):
        torch.testing.assert_close(found.double(), right, rtol=eps, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@given(COUNTS, seeds())
def test_products_are_those_of_each_expert(dtype: torch.dtype, counts: Counts, seed: int) -> None:
    check(counts, seed, dtype)


def with_a_one(x: Tensor) -> Tensor:
    """Rows that are followed by zeros, but for one entry."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, rounded(len(x)) - len(x)))
    padded[-1, 0] = 1.0
    return padded


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_follows_the_rows_must_add_nothing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check((20, 3), 0, dtype)
    monkeypatch.setattr(few_shapes, "_followed_by_zeros", with_a_one)
    with pytest.raises(AssertionError, match="not close"):
        check((20, 3), 0, dtype)


@given(COUNTS.filter(sum), st.data())
def test_other_experts_leave_no_trace(counts: Counts, data: st.DataObject) -> None:
    mine = data.draw(st.sampled_from([e for e, rows in enumerate(counts) if rows]))
    x, g, w = operands(counts, 0, torch.bfloat16)
    start = sum(counts[:mine])
    here = slice(start, start + counts[mine])
    broken = [torch.full_like(t, math.nan) for t in (x, g)]
    for t, whole in zip(broken, (x, g), strict=True):
        t[here] = whole[here]
    assert torch.equal(grouped_mm(broken[0], w, counts)[here], grouped_mm(x, w, counts)[here])
    outer = grouped_outer(broken[1], broken[0], counts)
    assert torch.equal(outer[mine], grouped_outer(g, x, counts)[mine])


@given(st.integers(1, 5000))
def test_at_most_half_is_computed_in_vain(rows: int) -> None:
    size = rounded(rows)
    assert rows <= size < rows + max(32, rows / 2)
    assert rounded(size) == size and size % 32 == 0


class Shapes(TorchDispatchMode):
    """The shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.seen.add((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


def shapes_of(dtype: torch.dtype) -> int:
    """How many shapes there are to compile if an expert gets from 1 to 256 rows."""
    with Shapes() as shapes:
        for rows in range(1, 257):
            x, g, w = operands((rows, 256 - rows), 0, dtype)
            grouped_mm(x[:, :-1], w[..., :-1], (rows, 256 - rows))
            grouped_outer(g[:, :-1], x, (rows, 256 - rows))
    return len(shapes.seen)


def test_few_shapes_are_compiled() -> None:
    sizes = {32, 64, 96, 128, 192, 256}
    assert shapes_of(torch.bfloat16) == 2 * len(sizes)
    assert shapes_of(torch.float32) == 2 * 256  # as they come: nothing is compiled for them
