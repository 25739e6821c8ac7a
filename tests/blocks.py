"""Models of a few sharded blocks, gathered all at once, block by block, or as a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from optree import tree_leaves
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp

from sharding import Comm, Mesh, Plan, Rule, make_plan, sharded
from sharding.sharded import Backward
from sharding.testing import meshes, rules, seeds

Block = dict[str, Tensor]
Loss = Callable[[list[Any], Tensor], Tensor]
Tensors = list[Tensor]
MODES: tuple[Backward, ...] = get_args(Backward)
GRANULARITIES = ("whole", "composed", "chain")
EVERY = [(granularity, mode) for granularity in GRANULARITIES for mode in MODES]


class Model(NamedTuple):
    """Blocks of a layer each: their number, their width, the rules of weights and scales.

    Smooth ones compute with tanh on random floats, where every order of adding has other bits;
    the others on small integers, without rounding.
    """

    mesh: Mesh
    weight: Rule
    scale: Rule
    blocks: int
    width: int
    dropout: float
    smooth: bool
    seed: int

    def plan(self) -> Plan:
        labels = [{"w": "weight", "b": "scale"}] * self.blocks
        return make_plan(
            self.params(), labels, {"weight": self.weight, "scale": self.scale}, self.mesh
        )

    def params(self, salt: int = 0) -> list[Block]:
        stream = torch.Generator().manual_seed(self.seed + salt)
        shapes = {"w": (self.width, self.width), "b": (self.width,)}
        return [
            {k: self.numbers(shape, stream) for k, shape in shapes.items()}
            for _ in range(self.blocks)
        ]

    def data(self, rank: int) -> Tensor:
        """Another number of rows on each rank, none on some."""
        stream = torch.Generator().manual_seed(self.seed + rank)
        return self.numbers(((self.seed + rank) % 4, self.width), stream)

    def numbers(self, shape: Sequence[int], stream: torch.Generator) -> Tensor:
        if self.smooth:
            return torch.randn(shape, generator=stream)
        return torch.randint(-2, 3, shape, generator=stream).double()


@st.composite
def models(draw: st.DrawFn, smooth: bool, mesh: Mesh | None = None) -> Model:
    """Models whose width the compute axes divide."""
    mesh = mesh or draw(meshes(4))
    weight, scale = draw(rules(mesh)), draw(rules(mesh))
    blocks, width = draw(st.integers(1, 3)), mesh.size * draw(st.integers(1, 2))
    dropout = draw(st.sampled_from([0.0, 0.5]))
    return Model(mesh, weight, scale, blocks, width, dropout, smooth, draw(seeds()))


def layer_of(model: Model) -> Callable[[Block, Tensor], Tensor]:
    """A layer that computes with as many columns and scales as this rank's views have."""

    def layer(view: Block, x: Tensor) -> Tensor:
        y = x[:, : len(view["w"])] @ view["w"]
        y = torch.tanh(y) if model.smooth else y
        scaled = y[:, : len(view["b"])] * view["b"]
        return F.dropout(torch.cat([scaled, y[:, len(view["b"]) :]], 1), model.dropout) + x

    return layer


def loss(granularity: str, mode: Backward, plan: Plan, comm: Comm, model: Model) -> Loss:
    """The same sum of squares, gathered all at once, block by block, or as a chain of blocks."""
    layers = [layer_of(model)] * model.blocks

    def compose(views: list[Block], x: Tensor) -> Tensor:
        for layer, view in zip(layers, views, strict=True):
            x = layer(view, x)
        return x

    def composed(shards: list[Block], x: Tensor) -> Tensor:
        for i, (layer, shard) in enumerate(zip(layers, shards, strict=True)):
            x = sharded(layer, plan[i], comm, mode)(shard, x)
        return x

    run: Any = {
        "plain": lambda: compose,
        "whole": lambda: sharded(compose, plan, comm, mode),
        "composed": lambda: composed,
        "chain": lambda: sharded(layers, plan, comm, mode),
    }[granularity]()
    return lambda shards, x: run(shards, x).square().sum()


# -- every derivative ------------------------------------------------------------------------------


def by_autograd(f: Loss, shards: Any, x: Tensor, u: Any) -> Tensors:
    leaves = [a.requires_grad_() for a in _leaves((shards, x))]
    return list(torch.autograd.grad(f(shards, x), leaves))


def by_vjp(f: Loss, shards: Any, x: Tensor, u: Any) -> Tensors:
    value, pull = vjp(f, shards, x)[:2]
    return [value, *_leaves(pull(torch.ones(())))]


def by_grad_and_value(f: Loss, shards: Any, x: Tensor, u: Any) -> Tensors:
    return _leaves(grad_and_value(f, argnums=(0, 1))(shards, x))


def by_double_backward(f: Loss, shards: Any, x: Tensor, u: Any) -> Tensors:
    leaves = [a.requires_grad_() for a in _leaves((shards, x))]
    first = torch.autograd.grad(f(shards, x), leaves, create_graph=True)
    return list(torch.autograd.grad(first, leaves, _leaves((u, x)), materialize_grads=True))


def by_jvp_of_grad(f: Loss, shards: Any, x: Tensor, u: Any) -> Tensors:
    return _leaves(jvp(grad(f, argnums=(0, 1)), (shards, x), (u, x)))


def by_grad_of_grad(f: Loss, shards: Any, x: Tensor, u: Any) -> Tensors:
    return _leaves(vjp(grad(f, argnums=(0, 1)), shards, x)[1]((u, x)))


# Where numbers are rounded, the second derivatives of a node that runs again add in another order.
FIRST = (by_autograd, by_vjp, by_grad_and_value, by_jvp_of_grad)
SECOND = (by_double_backward, by_jvp_of_grad, by_grad_of_grad)
DERIVATIVES = (*FIRST, by_double_backward, by_grad_of_grad)


def _leaves(tree: Any) -> Tensors:
    return tree_leaves(tree)
