"""T6: optimizers are torch.optim's, over random schedules; trainings are the plain reference's."""

from __future__ import annotations

import reference
import torch
from closeness import assert_close, assert_rejects
from hypothesis import given
from hypothesis import strategies as st
from laws import is_that_of_plain_torch

from functional_ep.testing import Chosen, Training, chosen, trainings


@given(chosen(), st.integers(1, 12), st.integers(0, 2**20))
def test_optimizers_are_those_of_torch(choice: Chosen, steps: int, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    p = torch.randn(5, generator=stream, dtype=torch.float64)
    theirs = p.clone().requires_grad_()
    torch_optimizer, ours = reference.optimizer(choice, [theirs]), choice.make()
    moments = {name: list(m.values()) for name, m in ours.init({"p": p}).items()}
    params = [p]
    for step in range(steps):
        g = torch.randn(5, generator=stream, dtype=torch.float64)
        before = params[0].clone()
        params, moments = ours.update(torch.tensor(step), params, [g], moments, False)
        theirs.grad = g.clone()
        torch_optimizer.param_groups[0]["lr"] = reference.rate(choice, step)
        torch_optimizer.step()
        assert_close(params[0], theirs.detach(), f"{choice.name} at step {step}")
        if reference.rate(choice, step) > 0:
            assert_rejects(before, theirs.detach(), "a step not taken")


@given(trainings())
def test_trainings_are_those_of_plain_torch(case: Training) -> None:
    is_that_of_plain_torch(case)
