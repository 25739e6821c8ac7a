"""Statistics of routings, and auxiliary losses that are the same on every mesh."""

from __future__ import annotations

from collections.abc import Callable

import torch
from budget import one_in
from hypothesis import given
from moe_cases import Case, assert_each_close, cases, counterexample, make_batch, normal
from torch import Tensor

from functional_ep.routing import Routing, balance_loss, route, statistics
from sharding import Comm, Mesh, simulate
from sharding.collectives import psum


def routed(case: Case) -> tuple[Routing, Tensor]:
    """A routing of all tokens, and which of them are no padding."""
    tokens = sum(case.tokens)
    logits_TE = 2 * normal((tokens, case.experts), case.seed)
    return route(logits_TE, case.choices), normal((tokens,), case.seed + 1) > 0


def take(routing: Routing, keep: Tensor) -> Routing:
    return Routing(*(x[keep] for x in routing))


@given(cases())
def test_statistics_are_sums_over_tokens(case: Case) -> None:
    routing, _ = routed(case)
    counts_E, probs_E, z = statistics(routing)
    assert counts_E.tolist() == [int((routing.ids_TK == e).sum()) for e in range(case.experts)]
    z_T = [row.exp().sum().log() ** 2 for row in routing.logits_TE]
    assert_each_close([probs_E, z], [sum_of(routing.probs_TE), torch.tensor(z_T).double().sum()])


def sum_of(xs_TE: Tensor) -> Tensor:
    total = torch.zeros(xs_TE.shape[1], dtype=torch.float64)
    for x_E in xs_TE:
        total = total + x_E
    return total


@given(cases())
def test_statistics_leave_padding_out(case: Case) -> None:
    routing, valid_T = routed(case)
    found, expected = statistics(routing, valid_T), statistics(take(routing, valid_T))
    assert torch.equal(found.counts_E, expected.counts_E)
    assert_each_close(found[1:], expected[1:])


def test_statistics_of_padding_too_are_rejected() -> None:
    routing, valid_T = routed(Case(Mesh(), (), (5,), 4, 4, 2, 1, 1, seed=0))
    assert 0 < valid_T.sum() < 5
    for found, expected in zip(
        statistics(routing), statistics(take(routing, valid_T)), strict=True
    ):
        assert not torch.allclose(found, expected)


# -- auxiliary losses on a mesh ------------------------------------------------------------------


def switch_loss(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Switch Transformers, eq. 4 to 6, over the whole batch: ``E sum_e f_e P_e``."""
    tokens, experts = probs_TE.shape
    f_E = torch.stack([(ids_TK == e).double().mean() for e in range(experts)])
    return experts * (f_E * probs_TE.sum(0) / tokens).sum()


def local_counts(counts_E: Tensor, comm: Comm) -> Tensor:
    return counts_E


def global_counts(counts_E: Tensor, comm: Comm) -> Tensor:
    return psum(counts_E, comm.mesh.axes, comm)


def check_balance(case: Case, counts: Callable[[Tensor, Comm], Tensor] = global_counts) -> None:
    """Values and gradients of both losses on the mesh are those of one process."""
    x_TD, router = make_batch(case).x_TD, normal((case.experts, case.dim), case.seed + 6)

    def losses(router: Tensor, x_TD: Tensor, comm: Comm | None) -> tuple[Tensor, Tensor]:
        routing = route(x_TD @ router.T, case.choices)
        seen = statistics(routing)
        if comm is None:
            z = torch.stack([row.exp().sum().log() ** 2 for row in x_TD @ router.T]).mean()
            return switch_loss(routing.probs_TE, routing.ids_TK), z
        tokens = max(1, sum(case.tokens))
        balance = balance_loss(seen.probs_E, counts(seen.counts_E, comm))
        return balance / tokens, seen.z / tokens

    def program(comm: Comm, x_TD: Tensor) -> list[Tensor]:
        return gradients(lambda router: losses(router, x_TD, comm), router)

    parts = simulate(program, case.mesh, x_TD.split(case.tokens))
    found = [torch.stack(column).sum(0) for column in zip(*parts, strict=True)]
    if any(case.tokens):
        assert_each_close(found, gradients(lambda router: losses(router, x_TD, None), router))
    else:
        assert not any(x.any() for x in found)


def gradients(f: Callable[[Tensor], tuple[Tensor, Tensor]], router: Tensor) -> list[Tensor]:
    """Two losses and the gradient of each."""
    one, zero = torch.ones(()).double(), torch.zeros(()).double()
    values, pull = torch.func.vjp(f, router)[:2]
    return [*values, *pull((one, zero)), *pull((zero, one))]


@one_in(2)
@given(cases())
def test_auxiliary_losses_and_gradients_are_those_of_one_process(case: Case) -> None:
    check_balance(case)


def test_local_fractions_are_rejected() -> None:
    assert counterexample(lambda case: check_balance(case, local_counts))


def test_balance_without_any_token_is_zero() -> None:
    none_E = torch.zeros(3, dtype=torch.int64)
    assert balance_loss(torch.zeros(3), none_E) == 0
