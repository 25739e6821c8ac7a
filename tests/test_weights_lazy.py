"""Lazy tensors: read(f(lazy), lo, hi) = ravel(f(x))[lo:hi], for any chain of ops and any interval.

Ops that only place slabs side by side, one after another or transposed read each number once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep.box import Box, boxes, sizes_of, slices_of
from functional_ep.huggingface import moves
from functional_ep.huggingface.lazy import Lazy, read
from functional_ep.huggingface.moves import RULES


class Step(NamedTuple):
    """An op on a list of tensors of one shape, giving another such list."""

    name: str
    dim: int

    def __call__(self, xs: list[Tensor]) -> list[Tensor]:
        return OPS[self.name](xs, self.dim % xs[0].dim())


def _halves(x: Tensor, dim: int) -> list[Tensor]:
    return list(x.chunk(2, dim)) if x.shape[dim] % 2 == 0 else [x]


def _next(x: Tensor, dim: int) -> int:
    return (dim + 1) % x.dim()


def _interleaved(x: Tensor, dim: int) -> Tensor:
    if x.shape[dim] % 2:
        return x
    shape = (*x.shape[:dim], x.shape[dim] // 2, 2, *x.shape[dim + 1 :])
    return x.reshape(shape).transpose(dim, dim + 1).reshape(x.shape).contiguous()


OPS: dict[str, Callable[[list[Tensor], int], list[Tensor]]] = {
    "stack": lambda xs, dim: [torch.stack(xs, dim)] if xs[0].dim() < 4 else xs,
    "cat": lambda xs, dim: [torch.cat(xs, dim)],
    "chunk": lambda xs, dim: [y for x in xs for y in _halves(x, dim)],
    "split": lambda xs, dim: [y for x in xs for y in x.split([x.shape[dim]], dim)],
    "unbind": lambda xs, dim: [y for x in xs for y in x.unbind(dim)] if xs[0].dim() > 1 else xs,
    "transpose": lambda xs, dim: [x.transpose(dim, _next(x, dim)).contiguous() for x in xs],
    "unsqueeze": lambda xs, dim: [x.unsqueeze(dim) for x in xs] if xs[0].dim() < 4 else xs,
    "squeeze": lambda xs, dim: [x.squeeze(dim) for x in xs] if xs[0].dim() > 1 else xs,
    "clone": lambda xs, dim: [x.clone() for x in xs],
    "interleave": lambda xs, dim: [_interleaved(x, dim) for x in xs],
    "flatten": lambda xs, dim: [x.reshape(x.shape[0], -1) for x in xs],
    "flip": lambda xs, dim: [x.flip(dim) for x in xs],  # has no rule: it is computed
}
SLABS = ("stack", "cat", "chunk", "split", "unbind", "unsqueeze", "squeeze", "clone")


class Case(NamedTuple):
    """Tensors of one shape, steps, and which part of the last result is read."""

    shape: tuple[int, ...]
    tensors_in: int
    steps: list[Step]
    ends: tuple[int, int]

    def tensors(self) -> list[Tensor]:
        size = torch.Size(self.shape).numel()
        return [
            torch.arange(i * size, (i + 1) * size).view(self.shape) for i in range(self.tensors_in)
        ]

    def apply(self, xs: list[Tensor]) -> Tensor:
        for step in self.steps:
            xs = step(xs)
        return xs[-1]

    def interval(self, size: int) -> tuple[int, int]:
        lo, hi = sorted(end % (size + 1) for end in self.ends)
        return lo, hi


@st.composite
def cases(draw: st.DrawFn, names: tuple[str, ...] = tuple(OPS)) -> Case:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3)))
    step = st.builds(Step, st.sampled_from(names), st.integers(0, 3))
    ends = st.tuples(st.integers(0, 2**16), st.integers(0, 2**16))
    return Case(shape, draw(st.integers(1, 3)), draw(st.lists(step, max_size=5)), draw(ends))


def obeys(case: Case) -> bool:
    """The law."""
    expected = case.apply(case.tensors())
    found: Any = case.apply([Lazy.of(x) for x in case.tensors()])  # lazy, as what it is made of
    lo, hi = case.interval(expected.numel())
    same_shape = found.shape == expected.shape
    return same_shape and torch.equal(read(found, lo, hi), expected.reshape(-1)[lo:hi])


@given(cases())
def test_a_part_of_the_result_is_that_part(case: Case) -> None:
    assert obeys(case)


def numbers_read(case: Case) -> tuple[int, int]:
    """How many are read of the sources, and how many were asked for."""
    count = [0]

    def counting(x: Tensor) -> Lazy:
        def fill(out: Tensor, box: Box) -> None:
            count[0] += out.numel()
            out.copy_(x[slices_of(box)])

        return Lazy.stored(x.shape, x.dtype, fill)

    result: Any = case.apply([counting(x) for x in case.tensors()])
    lo, hi = case.interval(result.numel())
    read(result, lo, hi)
    return count[0], hi - lo


@given(cases((*SLABS, "transpose")))
def test_slabs_are_read_once_and_nothing_else_is(case: Case) -> None:
    found, asked = numbers_read(case)
    assert found == asked


def test_what_is_computed_reads_more() -> None:
    case = find(cases(), lambda case: numbers_read(case)[0] > numbers_read(case)[1] > 0)
    assert {step.name for step in case.steps} & {"flip", "interleave", "flatten"}


@pytest.mark.parametrize("op", RULES, ids=str)
def test_a_wrong_rule_is_found(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[op]

    def backwards(results: Any, *args: Any, **kwargs: Any) -> Any:
        """The numbers of the box, in the other order."""

        def wrong(fill: moves.Fill) -> moves.Fill:
            def fill_backwards(out: Tensor, box: Box) -> None:
                right = torch.empty(sizes_of(box), dtype=out.dtype)
                fill(right, box)
                out.copy_(right.reshape(-1).flip(0).view(right.shape))

            return fill_backwards

        fills = rule(results, *args, **kwargs)
        return [wrong(fill) for fill in fills] if isinstance(fills, list) else wrong(fills)

    monkeypatch.setitem(RULES, op, backwards)
    assert not obeys(find(cases(), lambda case: not obeys(case)))


def test_ops_that_change_their_input_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="changes its input"):
        Lazy.of(torch.zeros(2)).add_(1)


@given(st.lists(st.integers(0, 4), max_size=4), st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_boxes_tile_the_interval_in_order(shape: list[int], ends: tuple[int, int]) -> None:
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    lo, hi = sorted(end % (x.numel() + 1) for end in ends)
    parts = [x[slices_of(box)].reshape(-1) for box in boxes(lo, hi, tuple(shape))]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *parts]), x.reshape(-1)[lo:hi])
    assert len(parts) <= max(1, 2 * len(shape) - 1)
