"""The law that holds all others of training in one, and the smallest trainings that test it."""

from __future__ import annotations

import reference
import torch
from closeness import assert_close, assert_leaves_close
from torch import Tensor

from functional_ep import lm
from functional_ep.testing import Chosen, Training, train
from sharding import Comm, Mesh, Plan, expert_parallel, zero3


def is_that_of_plain_torch(case: Training) -> None:
    """T1, T2, T4, T6, T7: losses, norms and parameters of all steps are the reference's."""
    expected = reference.train(case)
    for rank, found in enumerate(train(case)):
        for step, (metrics, params, plain) in enumerate(
            zip(found.metrics, found.params, expected, strict=True)
        ):
            where = f"of step {step} on rank {rank}"
            assert_close(metrics["loss"], plain.loss, f"loss {where}")
            assert_close(metrics["grad_norm"], plain.norm, f"norm {where}")
            for label, chosen in case.optimizers.items():
                rate = torch.tensor(reference.rate(chosen, step), dtype=torch.float64)
                assert_close(metrics[f"lr/{label}"], rate, f"rate {where}")
            assert_leaves_close(reference.named(params), plain.params, f"params {where}")


def whole_gradient(plan: Plan, grads: list[Tensor], comm: Comm) -> dict[str, Tensor]:
    """The global gradient by path, from this rank's shards of the gradients of trained leaves."""
    trained = [leaf for leaf in plan.leaves if leaf.label in plan.trained]
    whole = plan.at(trained).full(grads, comm)
    return dict(zip([leaf.path for leaf in trained], whole, strict=True))


def uneven(
    expert: Chosen | None = None, clip: float | None = None, balance: float = 0.0
) -> Training:
    """Two by two ranks with different numbers of tokens, two steps."""
    return Training(
        mesh=Mesh(edp=2, ep=2),
        rules={"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))},
        cfg=tiny(balance),
        sizes=((((1, 1), (2, 3), (0, 1), (1, 2)),),) * 2,
        optimizers={"dense": Chosen("sgd"), "expert": expert or Chosen("sgd")},
        clip=clip,
    )


def even() -> Training:
    """What a parity test usually is: two ranks, ep=2, as many tokens on each, one step of Adam."""
    return Training(
        mesh=Mesh(edp=1, ep=2),
        rules={"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))},
        cfg=tiny(),
        sizes=((((2, 2), (2, 2)),),),
        optimizers={"dense": Chosen(), "expert": Chosen()},
    )


def tiny(balance: float = 0.0) -> lm.Config:
    return lm.Config(
        vocab=7, dim=4, layers=1, heads=1, experts=4, top_k=2, ffn=3, balance=balance, z=0.0
    )
