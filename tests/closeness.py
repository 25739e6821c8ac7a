"""How close is close: the tolerances of the laws, in one place."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

RTOL, ATOL = 1e-9, 1e-12  # of float64


def assert_close(found: Tensor, expected: Tensor, what: str, rtol: float = RTOL) -> None:
    """``|found - expected| <= rtol max|expected| + atol``: scaled by the leaf's largest entry."""
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    if not found.numel():
        return
    error = float((found.double() - expected.double()).abs().max())
    bound = rtol * float(expected.double().abs().max()) + ATOL
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


def assert_leaves_close(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, rtol: float = RTOL
) -> None:
    """Every leaf, by path."""
    assert sorted(found) == sorted(expected), f"{what}: {sorted(found)} for {sorted(expected)}"
    for path, x in expected.items():
        assert_close(found[path], x, f"{what}, {path}", rtol)


def assert_rejects(found: Tensor, wrong: Tensor, what: str, rtol: float = RTOL) -> None:
    """The tolerance is worth something: it tells ``found`` from this planted wrong answer."""
    with pytest.raises(AssertionError):
        assert_close(found, wrong, what, rtol)
