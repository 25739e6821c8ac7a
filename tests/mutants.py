"""The twelve known bugs, as changes to the library, each with the narrow law that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from laws import is_that_of_plain_torch, uneven
from torch import Tensor

from functional_ep import (
    architecture,
    differentiate,
    lm,
    moe,
    norm,
    optim,
    permute,
    step_by_label,
    train_step,
)
from functional_ep.testing import Chosen
from sharding import Mesh, Rule, collectives, simulate
from sharding import gather as gather_module
from sharding.comm import Comm, Done, Op, Work
from sharding.gather import Layout, Reduce
from sharding.mesh import Axes
from sharding.testing import Case, check_adjoint, check_view

Patch = pytest.MonkeyPatch
EXPERT = Rule(("ep",), ("edp",))


class Mutant(NamedTuple):
    """A bug by name: how to plant it, and a law that holds without it and not with it."""

    name: str
    plant: Callable[[Patch], None]
    narrow: Callable[[], None]


def adjoint() -> None:
    """L4 of an expert leaf on two by two ranks."""
    check_adjoint(Case(EXPERT, Mesh(edp=2, ep=2), (4,), seed=1))


def scaled(factor: Callable[[Layout], float]) -> Callable[[Patch], None]:
    """Gradients of expert leaves times something."""

    def plant(patch: Patch) -> None:
        right = Reduce._finish

        def finish(self: Reduce, ys: list[Tensor]) -> list[Tensor]:
            pairs = zip(right(self, ys), self.layouts, strict=True)
            return [y * factor(w) if w.rule.compute else y for y, w in pairs]

        patch.setattr(Reduce, "_finish", finish)

    return plant


def forget_edp(patch: Patch) -> None:
    right = gather_module._sum_over

    def sum_over(store: Axes, copies: Axes, flat: list[Tensor], comm: Comm, of: str) -> Work:
        if store == ("edp",) and not copies:
            return Done([x.chunk(comm.mesh["edp"])[comm.index(store)] for x in flat])
        return right(store, copies, flat, comm, of)

    patch.setattr(gather_module, "_sum_over", sum_over)


def mean_of_means(patch: Patch) -> None:
    right = differentiate._sums

    def sums(*args: Any) -> Any:
        grads, total, count, aux = right(*args)
        n = count.clamp(min=1)
        return [g / n for g in grads], total / n, torch.ones_like(count), aux

    patch.setattr(differentiate, "_sums", sums)


def frozen_rate(patch: Patch) -> None:
    right = optim.by_label

    def by_label(*args: Any) -> Any:
        found = right(*args)
        update = found["expert"].update
        found["expert"] = found["expert"]._replace(
            update=lambda step, *rest: update(torch.zeros_like(step), *rest)
        )
        return found

    patch.setattr(step_by_label, "by_label", by_label)


def clip_per_label(patch: Patch) -> None:
    """Clipping inside each label's chain, where it can see only that label."""
    init = step_by_label.StepByLabel.__init__

    def clip_inside(
        self: Any, plan: Any, optimizers: Any, comm: Comm, clip: Any, donate: bool
    ) -> None:
        init(self, plan, optimizers, comm, None, donate)
        if clip is None:
            return
        for label, positions in self.positions.items():
            copies = [self.copies[i] for i in positions]
            update = self.optimizers[label].update

            def clipped(
                step: Any, ps: Any, gs: Any, *rest: Any, copies: Any = copies, update: Any = update
            ) -> Any:
                norm = train_step.global_norm(gs, copies, comm)
                factor = (clip / (norm + step_by_label.EPS)).clamp(max=1)
                return update(step, ps, [g * factor for g in gs], *rest)

            self.optimizers[label] = self.optimizers[label]._replace(update=clipped)

    patch.setattr(step_by_label.StepByLabel, "__init__", clip_inside)


def norm_without_ep(patch: Patch) -> None:
    def sum_over_edp(xs: list[Tensor], comm: Comm) -> list[Tensor]:
        return (
            comm.all_reduce(xs, ("edp",))
            if xs[0].dtype == torch.float64 and len(xs) == 1
            else (differentiate.sum_over_ranks(xs, comm))
        )

    patch.setattr(norm, "sum_over_ranks", sum_over_edp)


def local_counts(patch: Patch) -> None:
    right = differentiate.sum_over_ranks

    def sums(xs: list[Tensor], comm: Comm) -> list[Tensor]:
        return [xs[0], *right(xs, comm)[1:]]

    patch.setattr(lm, "sum_over_ranks", sums)


def idle_rank_skips(patch: Patch) -> None:
    right = moe.moe

    def skipping(experts: Any, x_TD: Tensor, *rest: Any) -> Tensor:
        return right(experts, x_TD, *rest) if len(x_TD) else x_TD

    patch.setattr(moe, "moe", skipping)
    patch.setattr(architecture, "moe", skipping)


def permutation_for_inverse(patch: Patch) -> None:
    right = permute.mix

    def mix(y: Tensor, weights_TK: Tensor, by: permute.Order) -> Tensor:
        return right(y, weights_TK, permute.Order(by.inverse, by.order))

    patch.setattr(moe, "mix", mix)


def other_axis_order(patch: Patch) -> None:
    right = Mesh.index
    patch.setattr(Mesh, "index", lambda self, rank, axes: right(self, rank, axes[::-1]))


def bool_for_group(patch: Patch) -> None:
    """``group=True`` taken for the world, and passed where the edp axes were meant."""
    check, right = Mesh.check, gather_module._sum_over
    patch.setattr(
        Mesh, "check", lambda self, axes: self.axes if axes is True else check(self, axes)
    )

    def sum_over(store: Axes, copies: Any, flat: list[Tensor], comm: Comm, of: str) -> Work:
        if copies == ("edp",) and not store:
            return comm.start(Op("all_reduce", True), flat)  # pyright: ignore[reportArgumentType]
        return right(store, copies, flat, comm, of)

    patch.setattr(gather_module, "_sum_over", sum_over)


def refuses_bool() -> None:
    """L8: an axis argument that is no tuple of names is refused."""

    def program(comm: Comm) -> str:
        try:
            collectives.psum(torch.ones(1), True, comm)  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            return str(error)
        return "accepted"

    assert "tuple of axis names" in simulate(program, Mesh(edp=2))[0]


def identity_experts() -> None:
    """M2: sent to experts that do nothing and back, tokens are themselves times their scores."""

    def program(comm: Comm) -> Tensor:
        x, ids = torch.arange(12.0).view(4, 3), torch.tensor([[2], [1], [3], [0]])
        way = moe.dispatch(x, ids, 4, ("ep",), comm)
        return moe.combine(way.rows_RD, torch.ones(4, 1), way, ("ep",), comm) - x

    for difference in simulate(program, Mesh(ep=2)):
        assert torch.equal(difference, torch.zeros(4, 3))


def idle_rank_takes_part() -> None:
    """M8: a rank without tokens serves its experts."""
    from functional_ep.routing import route

    def program(comm: Comm) -> Tensor:
        x = torch.ones(2 if comm.rank == 0 else 0, 1)
        experts = {"gate_up": torch.ones(1, 2, 1), "down": torch.ones(1, 1, 1)}
        return moe.moe(experts, x, route(torch.zeros(len(x), 2), 2), ("ep",), comm)

    assert [len(y) for y in simulate(program, Mesh(ep=2))] == [2, 0]


MUTANTS = [
    Mutant("expert gradient x ep", scaled(lambda w: w.mesh.count(w.rule.compute)), adjoint),
    Mutant("average over edp", scaled(lambda w: 1 / w.mesh["edp"]), adjoint),
    Mutant("edp reduction forgotten", forget_edp, adjoint),
    Mutant("mean of means", mean_of_means, lambda: is_that_of_plain_torch(uneven())),
    Mutant(
        "expert learning rate frozen",
        frozen_rate,
        lambda: is_that_of_plain_torch(uneven(expert=Chosen("sgd", "cosine"))),
    ),
    Mutant("clip per label", clip_per_label, lambda: is_that_of_plain_torch(uneven(clip=0.05))),
    Mutant("norm forgets ep", norm_without_ep, lambda: is_that_of_plain_torch(uneven())),
    Mutant(
        "local expert counts",
        local_counts,
        lambda: is_that_of_plain_torch(uneven(balance=0.5)),
    ),
    Mutant("idle rank skips", idle_rank_skips, idle_rank_takes_part),
    Mutant("permutation for inverse", permutation_for_inverse, identity_experts),
    Mutant(
        "axes in the other order",
        other_axis_order,
        lambda: check_view(Case(Rule(store=("edp", "ep")), Mesh(edp=2, ep=2), (8,), seed=1)),
    ),
    Mutant("bool for a group", bool_for_group, refuses_bool),
]
