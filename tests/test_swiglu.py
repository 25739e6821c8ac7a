"""swiglu: ``silu(gate) * up`` under every transform, keeping only its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budget import one_in
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_cases import check_closed
from moe_cases import normal
from torch import Tensor

from functional_ep.swiglu import swiglu, swiglu_mm
from sharding.node import Node
from sharding.testing import seeds


def composition(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@one_in(15)
@example(3, 2, 0)
@given(st.integers(0, 3), st.integers(0, 2), seeds())
def test_it_is_its_composition_under_every_transform(rows: int, width: int, seed: int) -> None:
    x = normal((rows, 2 * width), seed)
    check_closed(lambda xs: [swiglu(xs[0])], lambda xs: [composition(xs[0])], [x], seed)


COUNTS = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)


def pair(counts: tuple[int, ...], width: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal((sum(counts), 2 * width), seed), normal((len(counts), 2, width), seed + 1)


def unfused(h: Tensor, w: Tensor, counts: tuple[int, ...]) -> Tensor:
    rows = composition(h).split(counts)
    return torch.cat([x_e @ w_e.T for x_e, w_e in zip(rows, w, strict=True)])


@one_in(20)
@example((2, 0, 1), 2, 0)
@given(COUNTS, st.integers(1, 2), seeds())
def test_the_product_with_it_is_closed(counts: tuple[int, ...], width: int, seed: int) -> None:
    check_closed(
        lambda xs: [swiglu_mm(xs[0], xs[1], counts)],
        lambda xs: [unfused(xs[0], xs[1], counts)],
        list(pair(counts, width, seed)),
    )


class _Plain(Node):
    """``a b``, as the documentation of torch would have it written."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grads[0] * b, grads[0] * a

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        a, b = ctx.saved_tensors
        return tangents[0] * b + tangents[1] * a


class _Constant(_Plain):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grads[0] * b, grads[0] * a.detach()


@pytest.mark.parametrize(("node", "broken"), [(_Plain, "jvp of jvp"), (_Constant, "jvp of grad")])
def test_a_function_that_is_not_closed_is_rejected(node: type[Node], broken: str) -> None:
    xs = [normal((2,), 0), normal((2,), 1)]
    with pytest.raises(AssertionError, match=rf"^{broken}\["):
        check_closed(lambda xs: [node.apply(xs[0], xs[1])], lambda xs: [xs[0] * xs[1]], xs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_value_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    x = normal((5, 8), 0).to(dtype)
    gate, up = x.chunk(2, -1)
    assert torch.equal(swiglu(x), torch.nn.functional.silu(gate) * up)


def test_gradients_stay_finite_where_the_gate_saturates() -> None:
    x = torch.tensor([[-1e4, 0.0, 1e4, 2.0, 2.0, 2.0]], dtype=torch.float64)
    y, pull = torch.func.vjp(swiglu, x)[:2]
    assert y.tolist() == [[0, 0, 2e4]]
    assert pull(torch.ones_like(y))[0].tolist() == [[0, 1, 2, 0, 0, 1e4]]


def saved_bytes(f: Any, *xs: Tensor) -> int:
    """What autograd keeps, each storage once, the inputs aside."""
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        f(*(x.requires_grad_() for x in xs))
    return sum(kept.values()) - sum(kept.get(x.untyped_storage().data_ptr(), 0) for x in xs)


def test_nothing_is_kept_but_the_input() -> None:
    x = normal((16, 8), 0)
    assert saved_bytes(swiglu, x) == 0
    assert saved_bytes(composition, x) > 0
    counts, (h, w) = (3, 4), pair((3, 4), 2, 0)
    assert saved_bytes(lambda h, w: swiglu_mm(h, w, counts), h, w) == 0
    assert saved_bytes(lambda h, w: unfused(h, w, counts), h, w) > 0


def test_counts_that_do_not_fit_are_refused() -> None:
    h, w = pair((1, 1), 2, 0)
    with pytest.raises(ValueError, match=r"counts \(3, 0\) for 2 rows and 2 experts"):
        swiglu_mm(h, w, (3, 0))
