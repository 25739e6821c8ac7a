"""T12: every leaf of a trained label moves after one step with a non-zero gradient, no other."""

from __future__ import annotations

import reference
import torch
from hypothesis import given

from functional_ep.testing import Training, train, trainings


@given(trainings(max_steps=1))
def test_every_leaf_with_a_gradient_moves(case: Training) -> None:
    before = reference.named(case.params())
    (expected,) = reference.train(case)
    for rank in train(case):
        after = reference.named(rank.params[0])
        for path, x in before.items():
            moved = not torch.equal(after[path], x)
            if reference.label_of(path) in case.frozen:
                assert not moved, f"{path} is frozen and moves"
                continue
            chosen = case.optimizers[reference.label_of(path)]
            if bool(expected.grads[path].abs().max() > 1e-9):
                assert moved, f"{path} has a gradient and stays"
            elif "/experts/" in path and not chosen.weight_decay:  # a router's may be rounding
                still = bool((expected.grads[path] == 0).all())
                assert not (still and moved), f"{path} has no gradient and moves"
