"""cross_entropy: torch's sum, in pieces, under every transform, with one tensor of logits kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budget import one_in
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_cases import check_closed
from moe_cases import assert_each_close, normal
from torch import Tensor

from functional_ep import cross_entropy as module
from functional_ep.cross_entropy import IGNORE, cross_entropy
from sharding.testing import seeds


def composition(logits: Tensor, targets: Tensor) -> Tensor:
    valid = targets != IGNORE
    chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return ((logits.logsumexp(-1) - chosen) * valid).sum()


TARGETS = st.lists(st.sampled_from([0, 1, 2, IGNORE]), min_size=1, max_size=4)


@one_in(20)
@example([0, IGNORE, 2], 0)
@given(TARGETS, seeds())
def test_it_is_its_composition_under_every_transform(targets: list[int], seed: int) -> None:
    t = torch.tensor(targets)
    check_closed(
        lambda xs: [cross_entropy(xs[0], t)],
        lambda xs: [composition(xs[0], t)],
        [normal((len(targets), 3), seed)],
        seed,
    )


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("at_once", [1, 10, 1000])
def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch, tokens: int, at_once: int) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    z, t = normal((tokens, 5), 0).requires_grad_(), torch.arange(tokens) % 5
    t[3:5] = IGNORE
    found, right = cross_entropy(z, t), composition(z, t)
    assert_each_close([found.detach()], [right.detach()])
    assert_each_close(torch.autograd.grad(found, z), torch.autograd.grad(right, z))


def test_narrow_logits_are_summed_in_float32_and_have_narrow_gradients() -> None:
    z = normal((6, 8), 0).bfloat16().requires_grad_()
    t = torch.arange(6)
    found = cross_entropy(z, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, composition(z.float(), t))
    (slope,) = torch.autograd.grad(found, z)
    assert torch.equal(slope, torch.autograd.grad(composition(z.float(), t), z)[0])


def test_a_target_out_of_range_is_refused() -> None:
    with pytest.raises(IndexError):
        cross_entropy(torch.zeros(1, 3), torch.tensor([3]))


def kept(f: Any, z: Tensor, t: Tensor) -> int:
    """Entries that autograd keeps, beside the logits."""
    storages: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        f(z.requires_grad_(), t)
    return sum(storages.values()) - storages.get(z.untyped_storage().data_ptr(), 0)


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    z, t = normal((16, 32), 0), torch.arange(16)
    assert kept(cross_entropy, z, t) == t.numel()
    assert kept(lambda z, t: torch.nn.functional.cross_entropy(z, t), z, t) >= z.numel()
