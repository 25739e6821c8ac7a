"""Mixtures of experts for hypothesis to draw, and the dense reference of the MoE laws.

Hypothesis draws the structure, one seed supplies the numbers. Tensors of a ``Batch`` and an
``Outcome`` are those of the whole mesh: rank after rank, all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from closeness import assert_close
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from torch import Tensor

import functional_ep.moe
from functional_ep.routing import Routing
from sharding import Comm, Mesh, simulate
from sharding.mesh import Axes
from sharding.rule import Shape
from sharding.testing import axes_of, meshes, seeds

MAX_EXPERTS = 6  # unless there are more ranks to hold them
MAX_TOKENS = 3

Numbers = Callable[[Shape, int], Tensor]
Weights = Mapping[str, Tensor]
Moe = Callable[[Weights, Tensor, Routing, Axes, Comm], Tensor]


class Case(NamedTuple):
    """A mixture of experts on a mesh: what the laws are about."""

    mesh: Mesh
    axes: Axes  # the mesh axes that split the experts
    tokens: tuple[int, ...]  # of each rank
    experts: int
    busy: int  # experts that tokens may choose; the others are idle
    choices: int
    dim: int
    hidden: int
    seed: int

    @property
    def local(self) -> int:
        """Experts per rank."""
        return self.experts // self.mesh.count(self.axes)

    def place(self, rank: int) -> int:
        """Which of the parts of the experts a rank holds: row-major in the order of the axes."""
        place, coords = 0, self.mesh.coords(rank)
        for axis in self.axes:
            place = place * self.mesh[axis] + coords[axis]
        return place

    def held(self, rank: int) -> slice:
        """The global ids of a rank's experts."""
        return slice(self.place(rank) * self.local, (self.place(rank) + 1) * self.local)

    def colleagues(self, rank: int) -> list[int]:
        """The ranks that exchange tokens with this one, itself included."""
        here, others = self.mesh.coords(rank), self.mesh.rest(self.axes)
        coords = {r: self.mesh.coords(r) for r in self.mesh}
        return [r for r in self.mesh if all(coords[r][axis] == here[axis] for axis in others)]


@st.composite
def cases(draw: st.DrawFn, max_ranks: int = 8, max_tokens: int = MAX_TOKENS) -> Case:
    """Any mesh, any axes for the experts; ranks and experts without tokens; K up to E."""
    mesh = draw(meshes(max_ranks))
    axes = draw(axes_of(mesh))
    ranks = mesh.count(axes)
    tokens = tuple(draw(st.integers(0, max_tokens)) for _ in mesh)
    experts = ranks * draw(st.integers(1, max(1, MAX_EXPERTS // ranks)))
    busy = draw(st.integers(1, experts))
    choices = draw(st.integers(1, busy))
    dim, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Case(mesh, axes, tokens, experts, busy, choices, dim, hidden, draw(seeds()))


def counterexample(law: Callable[[Case], None]) -> Case:
    """A case that breaks a law; ``hypothesis.errors.NoSuchExample`` if none is found."""

    def breaks(case: Case) -> bool:
        try:
            law(case)
        except AssertionError:
            return True
        return False

    return find_case(breaks)


def find_case(predicate: Callable[[Case], bool]) -> Case:
    """A case, not the simplest one; ``hypothesis.errors.NoSuchExample`` if none is found."""
    search = settings(
        max_examples=400, deadline=None, database=None, derandomize=True, phases=[Phase.generate]
    )
    return find(cases(), predicate, settings=search)


# -- numbers -------------------------------------------------------------------------------------


def normal(shape: Shape, seed: int) -> Tensor:
    """Random float64 numbers."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=stream, dtype=torch.float64)


class Batch(NamedTuple):
    """Tokens, their choices and scores, and a cotangent for what becomes of them."""

    x_TD: Tensor
    ids_TK: Tensor
    scores_TK: Tensor
    g_TD: Tensor

    def split(self, tokens: Sequence[int]) -> list[Batch]:
        """The batch of each rank."""
        return [Batch(*parts) for parts in zip(*(x.split(tokens) for x in self), strict=True)]


def make_batch(case: Case, numbers: Numbers = normal) -> Batch:
    """The batch of the whole mesh; a token's choices are distinct."""
    total, seed = sum(case.tokens), case.seed
    stream = torch.Generator().manual_seed(seed)
    busy = torch.randperm(case.experts, generator=stream)[: case.busy]
    order = torch.rand(total, case.busy, generator=stream).argsort(-1)[:, : case.choices]
    scores = numbers((total, case.choices), seed + 1)
    x, g = (numbers((total, case.dim), seed + i) for i in (2, 3))
    return Batch(x, busy[order], scores, g)


def idle_experts(batch: Batch, experts: int) -> list[int]:
    """The experts that no token has chosen."""
    return sorted(set(range(experts)) - set(batch.ids_TK.flatten().tolist()))


def make_weights(case: Case, numbers: Numbers = normal) -> dict[str, Tensor]:
    """All experts."""
    e, d, f = case.experts, case.dim, case.hidden
    return {
        "gate_up": numbers((e, 2 * f, d), case.seed + 4),
        "down": numbers((e, d, f), case.seed + 5),
    }


def as_routing(ids_TK: Tensor, scores_TK: Tensor, experts: int) -> Routing:
    """A routing that no router has made."""
    none_TE = scores_TK.new_zeros(len(ids_TK), experts)
    return Routing(ids_TK, scores_TK, none_TE, none_TE)


# -- on the mesh and without it ------------------------------------------------------------------


class Outcome(NamedTuple):
    """The output, and the gradient of its product with the cotangent."""

    y_TD: Tensor
    x_TD: Tensor
    scores_TK: Tensor
    gate_up: Tensor
    down: Tensor


def on_mesh(
    case: Case, batch: Batch, weights: Weights, moe: Moe = functional_ep.moe.moe
) -> Outcome:
    """The outcome on the case's mesh, with expert gradients added up over all ranks."""
    results = simulate(program(case, weights, moe), case.mesh, batch.split(case.tokens))
    columns = list(zip(*results, strict=True))
    whole = {name: torch.zeros_like(w) for name, w in weights.items()}
    for rank, view in enumerate(columns[3]):
        for name, g in view.items():
            whole[name][case.held(rank)] += g
    return Outcome(*(torch.cat(column) for column in columns[:3]), **whole)


def program(case: Case, weights: Weights, moe: Moe) -> Callable[[Comm, Batch], tuple[Any, ...]]:
    """For each rank: ``y`` and the gradients of its tokens, scores and view of the experts."""

    def run(comm: Comm, batch: Batch) -> tuple[Any, ...]:
        def f(x_TD: Tensor, scores_TK: Tensor, view: Weights) -> Tensor:
            routing = as_routing(batch.ids_TK, scores_TK, case.experts)
            return moe(view, x_TD, routing, case.axes, comm)

        view = {name: w[case.held(comm.rank)] for name, w in weights.items()}
        y_TD, pull = torch.func.vjp(f, batch.x_TD, batch.scores_TK, view)[:2]
        return y_TD, *pull(batch.g_TD)

    return run


def densely(batch: Batch, weights: Weights) -> Outcome:
    """The outcome of the dense reference."""

    def f(x_TD: Tensor, scores_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return dense_moe(gate_up, down, x_TD, batch.ids_TK, scores_TK)

    inputs = batch.x_TD, batch.scores_TK, weights["gate_up"], weights["down"]
    y_TD, pull = torch.func.vjp(f, *inputs)[:2]
    return Outcome(y_TD, *pull(batch.g_TD))


def dense_moe(
    gate_up: Tensor, down: Tensor, x_TD: Tensor, ids_TK: Tensor, scores_TK: Tensor
) -> Tensor:
    """``sum_k score_tk FFN_{id_tk}(x_t)``, token by token and choice by choice."""
    y_TD = torch.zeros_like(x_TD)
    for t, chosen in enumerate(ids_TK.tolist()):
        for k, e in enumerate(chosen):
            gate, up = (gate_up[e] @ x_TD[t]).chunk(2)
            row = down[e] @ (gate * torch.sigmoid(gate) * up)
            y_TD = y_TD.index_put((torch.tensor(t),), scores_TK[t, k] * row, accumulate=True)
    return y_TD


def sum_over_experts(
    gate_up: Tensor, down: Tensor, x_TD: Tensor, ids_TK: Tensor, scores_TK: Tensor
) -> Tensor:
    """The same as a formula, which every transform of torch can follow."""
    gate, up = torch.einsum("efd,td->tef", gate_up, x_TD).chunk(2, -1)
    rows_TED = torch.einsum("edf,tef->ted", down, gate * torch.sigmoid(gate) * up)
    chosen_TKE = ids_TK.unsqueeze(-1) == torch.arange(len(down))
    return torch.einsum("tk,tke,ted->td", scores_TK, chosen_TKE.to(x_TD.dtype), rows_TED)


def assert_each_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], what: str = "found"
) -> None:
    """Equal to nine digits of the largest entry, as sums in another order are."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert_close(a, b, f"{what}[{i}]")


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal to the bit."""
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=0, atol=0)
