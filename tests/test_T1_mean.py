"""T1: the gradient on a mesh is the gradient of the global mean loss in one process."""

from __future__ import annotations

import reference
import torch
from closeness import assert_close, assert_leaves_close, assert_rejects
from hypothesis import given
from laws import whole_gradient
from torch import Tensor

from functional_ep import lm
from functional_ep.differentiate import accumulate, sum_over_ranks
from functional_ep.testing import Training, prepare, trainings
from sharding import Comm, simulate


def gradient(comm: Comm, case: Training) -> tuple[dict[str, Tensor], Tensor]:
    """Global gradient of the mean, of what is trained, and global mean, in the first step."""
    plan, state, _ = prepare(comm, case)
    loss = lm.loss(case.cfg, plan, comm, case.backward)
    shards = plan.check_shards(state.params, comm)
    grads, total, count, _ = accumulate(loss, plan, shards, case.batches(comm.rank)[0])
    total, count = sum_over_ranks([total, count], comm)
    divisor = count.clamp(min=1)
    return whole_gradient(plan, [g / divisor for g in grads], comm), total / divisor


@given(trainings(max_steps=1))
def test_gradient_is_that_of_the_global_mean(case: Training) -> None:
    (expected,) = reference.train(case)
    for found, loss in simulate(gradient, case.mesh, [case] * case.mesh.size):
        assert_close(loss, expected.loss, "loss")
        assert_leaves_close(found, expected.grads, "gradient")


def test_tolerance_rejects_a_mean_of_means() -> None:
    """Two ranks with one and three labels: averaging their means is off by far more."""
    means = torch.tensor([1.0, 2.0]).double()
    right = (means * torch.tensor([1, 3])).sum() / 4
    assert_rejects(means.mean(), right, "mean of means")
