"""T15: derivatives through steps are those of one process, on every mesh and under every rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from closeness import assert_close
from farm import Farm
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep import (
    Optimizer,
    State,
    adamw,
    init_state,
    make_train_step,
    norm,
    optim,
    sgd,
    step_by_label,
)
from functional_ep.step_by_label import EPS
from sharding import (
    Comm,
    Mesh,
    Plan,
    expert_parallel,
    make_plan,
    replicated,
    sharded,
    simulate,
    zero3,
)
from sharding.collectives import pvary
from sharding.plan import Copy
from sharding.testing import meshes, plans, seeds

Leaves = list[Tensor]
STEPS = 3


class Case(NamedTuple):
    plan: Plan
    clip: float | None
    adam: bool
    seed: int

    def numbers(self, what: int = 0) -> Leaves:
        random = torch.Generator().manual_seed(self.seed + what)
        return [
            torch.randn(leaf.shape, dtype=torch.float64, generator=random)
            for leaf in self.plan.leaves
        ]

    @property
    def batch(self) -> Tensor:
        """A number for each rank."""
        return torch.linspace(-1, 2, self.plan.mesh.size, dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    plan = draw(plans(draw(meshes(4))))
    assume(
        sum(math.prod(leaf.shape) for leaf in plan.leaves)
    )  # the norm of nothing has no derivative
    return Case(plan, draw(st.sampled_from([None, 0.5])), draw(st.booleans()), draw(seeds()))


def an_optimizer(adam: bool, rate: Tensor) -> Optimizer:
    return adamw(lambda step: rate, eps=1e-2) if adam else sgd(lambda step: rate, momentum=0.9)


def loss_of(view: Leaves, x: Tensor) -> tuple[Tensor, int]:
    return torch.stack([(w.sin() * x + w.square()).sum() for w in view]).sum(), 2


# -- by ranks --------------------------------------------------------------------------------------


def after_steps(case: Case, comm: Comm, x: Tensor, shards: Leaves, rate: Tensor) -> Tensor:
    """Loss and norm of the last step."""
    plan = case.plan
    optimizers: Mapping[str, Optimizer] = {
        label: an_optimizer(case.adam, pvary(rate, plan.rules[label].axes, comm))
        for label in plan.labels
    }
    step = make_train_step(sharded(loss_of, plan, comm), plan, optimizers, comm, clip=case.clip)
    state: State = init_state(shards, plan, optimizers)
    metrics: dict[str, Tensor] = {}
    for _ in range(STEPS):
        state, metrics = step(state, x)
    return metrics["loss"] + metrics["grad_norm"]


def on_a_rank(comm: Comm, x: Tensor, case: Case) -> tuple[Leaves, Tensor, Tensor]:
    shards, along = (case.plan.shard(case.numbers(i), comm) for i in (0, 1))
    grads, to_rate, tangent = derivatives(partial(after_steps, case, comm, x), shards, along)
    return case.plan.full(grads, comm), to_rate, tangent


# -- in one process --------------------------------------------------------------------------------


def views(case: Case, params: Leaves, rank: int) -> Leaves:
    """What each rank computes with, cut out of the whole."""
    found: Leaves = []
    for w, layout in zip(params, case.plan.layouts, strict=True):
        rows, compute = (layout.view_shape or (0,))[0], layout.rule.compute
        start = case.plan.mesh.index(rank, compute) * rows
        found.append(w[start : start + rows] if compute and w.dim() else w)
    return found


def in_one_process(case: Case, params: Leaves, rate: Tensor) -> Tensor:
    m, v = ([torch.zeros_like(w) for w in params] for _ in range(2))
    loss = size = torch.zeros(())

    def mean(params: Leaves) -> Tensor:
        each = [loss_of(views(case, params, r), x)[0] for r, x in enumerate(case.batch)]
        return torch.stack(each).sum() / (2 * len(each))

    for t in range(1, STEPS + 1):
        grads, loss = torch.func.grad_and_value(mean)(params)
        size = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        factor = 1.0 if case.clip is None else (case.clip / (size + EPS)).clamp(max=1)
        grads = [g * factor for g in grads]
        if case.adam:
            m = [0.9 * a + 0.1 * g for a, g in zip(m, grads, strict=True)]
            v = [0.95 * b + 0.05 * g.square() for b, g in zip(v, grads, strict=True)]
            roots = [(b / (1 - 0.95**t)).sqrt() + 1e-2 for b in v]
            moves = [a / (1 - 0.9**t) / root for a, root in zip(m, roots, strict=True)]
            params = [w * (1 - 0.1 * rate) for w in params]
        else:
            m = moves = [0.9 * a + g for a, g in zip(m, grads, strict=True)]
        params = [w - rate * move for w, move in zip(params, moves, strict=True)]
    return loss + size


# -- the law ---------------------------------------------------------------------------------------


def derivatives(
    f: Callable[..., Tensor], at: Leaves, along: Leaves
) -> tuple[Leaves, Tensor, Tensor]:
    """By the parameters, by the rate, and along a direction in both."""
    rate = torch.tensor(0.01, dtype=torch.float64)
    by_both: Any = torch.func.grad(f, (0, 1))(at, rate)
    along_both: Any = torch.func.jvp(f, (at, rate), (along, 3 * rate))
    return *by_both, along_both[1]


def check_through(case: Case, run: Callable[..., Any] = simulate) -> None:
    expected = derivatives(partial(in_one_process, case), case.numbers(), case.numbers(1))
    mesh = case.plan.mesh
    for grads, to_rate, tangent in run(on_a_rank, mesh, case.batch, [case] * mesh.size):
        for g, right in zip(grads, expected[0], strict=True):
            assert_close(g, right, "gradient")
        assert_close(to_rate, expected[1], "derivative by the rate")
        assert_close(tangent, expected[2], "jvp")


@given(cases())
def test_derivatives_through_steps_are_those_of_one_process(case: Case) -> None:
    check_through(case)


MIXED = Case(
    make_plan(
        [torch.zeros(shape, dtype=torch.float64) for shape in ((3, 2), (2, 2), (4,))],
        ["dense", "expert", "copied"],
        {"dense": zero3("edp"), "expert": expert_parallel("edp"), "copied": replicated()},
        Mesh(edp=2),
    ),
    clip=0.5,
    adam=True,
    seed=0,
)


def test_so_they_are_on_real_ranks(ranks2: Farm) -> None:
    check_through(MIXED, ranks2.run)


def counted_on_one_copy(parts: Sequence[Tensor], copies: Sequence[Copy], comm: Comm) -> Tensor:
    return torch.stack([x * c.counts for x, c in zip(parts, copies, strict=True)]).sum()


PLANTED: dict[str, tuple[Any, str, Any]] = {
    "the factor as a value of each rank": (
        step_by_label.StepByLabel, "_varying", lambda self, factor, label: factor
    ),
    "copies that do not count as constants": (norm, "counted_once", counted_on_one_copy),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_the_law_rejects(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLANTED[name])
    with pytest.raises(AssertionError, match="off by"):
        check_through(MIXED)


def idle_entry(comm: Comm) -> Tensor:
    tx, params = adamw(0.1, weight_decay=0.0), {"w": torch.ones(2, dtype=torch.float64)}
    plan = make_plan(params, {"w": "dense"}, {"dense": zero3()}, comm.mesh)
    loss = sharded(lambda view, _: (view["w"][:1].square().sum(), 1), plan, comm)
    step = make_train_step(loss, plan, tx, comm, clip=1.0)

    def twice(params: dict[str, Tensor]) -> Tensor:
        state, _ = step(init_state(params, plan, tx), None)
        return step(state, None)[1]["loss"]

    return torch.func.grad(twice)(params)["w"]


def test_an_entry_without_a_gradient_has_a_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an expert without tokens has; the root of its second moment has none."""
    (found,) = simulate(idle_entry, Mesh())
    assert_close(found, torch.tensor([1.8, 0.0]), "gradient", rtol=1e-7)
    monkeypatch.setattr(optim, "_root", torch.sqrt)
    assert simulate(idle_entry, Mesh())[0].isnan().any()
