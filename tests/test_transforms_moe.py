"""Transforms of a whole block: gather, route, dispatch, experts, combine, on shards and tokens.

On every rank each transform is that of the dense block: reverse mode differentiates the sum of what
all ranks compute, forward mode moves the shards and tokens of all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import moe_mutants
import pytest
import torch
import transforms
from budget import one_in
from farm import Farm
from hypothesis import example, given
from hypothesis import strategies as st
from moe_cases import (
    Case,
    Moe,
    Weights,
    assert_each_close,
    cases,
    make_batch,
    make_weights,
    normal,
    sum_over_experts,
)
from torch import Tensor
from transforms import F, Leaves

import functional_ep.moe
from functional_ep.routing import Routing, route
from sharding import Comm, Mesh, Plan, Rule, make_plan, partition, sharded, simulate
from sharding.mesh import Axes
from sharding.sharded import Backward

LABELS = {"experts": {"down": "expert", "gate_up": "expert"}, "router": "dense"}


class Block(NamedTuple):
    """A mixture of experts, what splits its leaves between steps, and how views are treated."""

    case: Case
    router_store: Axes
    expert_store: Axes
    backward: Backward

    @property
    def rules(self) -> dict[str, Rule]:
        return {
            "dense": Rule(store=self.router_store),
            "expert": Rule(self.case.axes, self.expert_store),
        }

    @property
    def plan(self) -> Plan:
        down, gate_up, router, _ = self.leaves()
        params = {"experts": {"down": down, "gate_up": gate_up}, "router": router}
        return make_plan(params, LABELS, self.rules, self.case.mesh)

    def leaves(self, salt: int = 0) -> Leaves:
        """Of the whole mesh: experts and router as the plan orders them, then the tokens."""
        case = self.case._replace(seed=self.case.seed + 100 * salt)
        weights, x_TD = make_weights(case), make_batch(case).x_TD
        router = normal((case.experts, case.dim), case.seed + 6)
        return [weights["down"], weights["gate_up"], router, x_TD]

    def outputs(self, salt: int) -> Leaves:
        """Something in the shape of what the block returns."""
        return [normal((sum(self.case.tokens), self.case.dim), self.case.seed + 100 * salt)]


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Any axes may store the router, any others than the experts' may store experts."""
    case: Case = draw(cases(max_ranks=4, max_tokens=2))
    router = draw(st.permutations(case.mesh.axes))
    expert = draw(st.permutations(case.mesh.rest(case.axes)))
    count = draw(st.integers(0, len(router))), draw(st.integers(0, len(expert)))
    backward: Backward = draw(st.sampled_from(get_args(Backward)))
    return Block(case, tuple(router[: count[0]]), tuple(expert[: count[1]]), backward)


def rows(block: Block, rank: int, x: Tensor) -> Tensor:
    """A rank's tokens; dims of lanes may come before."""
    return x.split(block.case.tokens, -2)[rank]


def shards(block: Block, rank: int, leaves: Leaves) -> Leaves:
    """A rank's part of leaves of the whole mesh; dims of lanes may come before."""
    cut: Leaves = []
    for leaf, x in zip(block.plan.leaves, leaves[:-1], strict=True):
        lanes = x.shape[: x.dim() - len(leaf.shape)]
        rule, mesh = block.rules[leaf.label], block.case.mesh
        flat = [partition(rule, mesh, rank, part) for part in x.reshape(-1, *leaf.shape)]
        cut.append(torch.stack(flat).reshape(*lanes, -1))
    return [*cut, rows(block, rank, leaves[-1])]


def local(block: Block, comm: Comm, moe: Moe) -> F:
    """The block as one rank computes it."""
    case, plan = block.case, block.plan

    def compute(view: Any, x_TD: Tensor) -> Tensor:
        routing = route(x_TD @ view["router"].T, case.choices)
        return x_TD + moe(view["experts"], x_TD, routing, case.axes, comm)

    run = sharded(compute, plan, comm, block.backward)
    return lambda leaves: [run(plan.unflatten(leaves[:-1]), leaves[-1])]


def dense(block: Block) -> F:
    """The block on all tokens at once, with no collective."""
    choices = block.case.choices

    def f(leaves: Leaves) -> Leaves:
        down, gate_up, router, x_TD = leaves
        weight_TE = (x_TD @ router.T).exp()
        ids_TK = weight_TE.argsort(-1, descending=True)[:, :choices]
        chosen_TK = weight_TE.gather(1, ids_TK)
        scores_TK = chosen_TK / chosen_TK.sum(1, keepdim=True)
        return [x_TD + sum_over_experts(gate_up, down, x_TD, ids_TK, scores_TK)]

    return f


def program(
    comm: Comm,
    block: Block,
    x: Leaves,
    u: Leaves,
    v: Leaves,
    basis: Leaves,
    moe: Moe = functional_ep.moe.moe,
) -> dict[str, Leaves]:
    """Every transform of one rank's block, and its rows of the Jacobian."""
    f = local(block, comm, moe)
    results = {name: t(f, x, u, v) for name, (_, t) in transforms.SHARED.items()}
    results["jacrev"] = pull_lanes(f, x, basis)
    plain = transforms.plain_autograd(f, x, u, v)
    return results | {f"autograd {name}": result for name, result in plain.items()}


def pull_lanes(f: F, x: Leaves, basis: Leaves) -> Leaves:
    """The pull-back of every lane; those of all unit vectors are the Jacobian."""
    pull = torch.func.vjp(f, x)[1]
    return torch.vmap(lambda v: pull(v)[0])(basis)


def check_block(block: Block, ranks: Any = simulate, program: Callable[..., Any] = program) -> None:
    """Each rank's results are its part of the results of the dense block."""
    case, f = block.case, dense(block)
    x, u, v = block.leaves(), block.leaves(1), block.outputs(2)
    units = torch.eye(v[0].numel() + 1, dtype=torch.float64)[:, :-1]  # and zero, for no tokens
    basis = units.unflatten(1, v[0].shape)
    expected: dict[str, tuple[str, Leaves]]
    expected = {name: (side, t(f, x, u, v)) for name, (side, t) in transforms.SHARED.items()}
    expected["jacrev"] = "input", pull_lanes(f, x, [basis])
    for name in ("vjp", "grad of grad"):
        expected[f"autograd {name}"] = expected[name]
    arguments = [
        *([shards(block, rank, leaves) for rank in case.mesh] for leaves in (x, u)),
        *([[rows(block, rank, y)] for rank in case.mesh] for y in (v[0], basis)),
    ]
    found = ranks(program, case.mesh, [block] * case.mesh.size, *arguments)
    for rank, results in enumerate(found):
        for name, (side, whole) in expected.items():
            assert not any(x.requires_grad for x in results[name]), f"{name} holds on to its graph"
            part = shards(block, rank, whole) if side == "input" else [rows(block, rank, whole[0])]
            assert_each_close(results[name], part, f"{name} on rank {rank}")


HARD = Case(Mesh(edp=2, ep=2), ("ep",), (2, 0, 1, 2), 4, 4, 2, 2, 1, seed=0)


@one_in(60)
@example(Block(HARD, ("edp", "ep"), ("edp",), "regather"))
@example(Block(HARD, ("ep",), (), "recompute"))
@given(blocks())
def test_every_transform_of_a_block_is_that_of_the_dense_block(block: Block) -> None:
    check_block(block)


REAL = Case(Mesh(ep=2), ("ep",), (2, 1), 4, 4, 2, 2, 1, seed=0)


@pytest.mark.parametrize(
    ("axes", "tokens"), [(("ep",), (2, 1)), (("ep",), (0, 2)), (("ep",), (0, 0)), ((), (2, 1))]
)
def test_real_ranks_have_every_transform(ranks2: Farm, axes: Axes, tokens: tuple[int, ...]) -> None:
    check_block(Block(REAL._replace(tokens=tokens, axes=axes), ("ep",), (), "regather"), ranks2.run)


def bend(weights: Weights, x_TD: Tensor, routing: Routing, axes: Axes, comm: Comm) -> Tensor:
    """Right in value and first derivative."""
    curved = [(w - w.detach()).square().sum() for w in weights.values()]
    return functional_ep.moe.moe(weights, x_TD, routing, axes, comm) + torch.stack(curved).sum()


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (moe_mutants.rerouted(moe_mutants.forget_the_last_expert), "value"),
        (moe_mutants.scale_expert_gradients, "vjp"),
        (bend, "jvp of grad"),
    ],
)
def test_a_wrong_block_is_rejected(mutant: Moe, broken: str) -> None:
    with pytest.raises(AssertionError, match=f"^{broken} on rank"):
        check_block(Block(HARD, (), (), "keep"), program=partial(program, moe=mutant))
