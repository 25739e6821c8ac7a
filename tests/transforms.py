"""Transforms of ``f: list of tensors -> list of tensors``, and what they mean on all ranks at once.

On the mesh each rank transforms its own program. Densely the same transform is applied to the one
function of all ranks' parameters: reverse mode differentiates the sum of what all ranks compute,
forward mode moves the parameters of all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap

Leaves = list[Tensor]
F = Callable[[Leaves], Leaves]


def pull(f: F, x: Leaves, v: Leaves) -> Leaves:
    return vjp(f, x)[1](v)[0]


def push(f: F, x: Leaves, u: Leaves) -> Leaves:
    return jvp(f, (x,), (u,))[1]


def pull_at(f: F, v: Leaves) -> F:
    return lambda x: pull(f, x, v)


def lanes(xs: Leaves) -> Leaves:
    return [torch.stack([x, 2 * x, -x]) for x in xs]


def first_batched(f: F, x: Leaves) -> Leaves:
    dims = [0 if i == 0 else None for i in range(len(x))]
    return vmap(f, in_dims=(dims,))([*lanes(x[:1]), *x[1:]])


def last_batched(f: F, x: Leaves) -> Leaves:
    return vmap(f, in_dims=-1)([a.movedim(0, -1) for a in lanes(x)])


# Name -> (which side of f the result has the shape of, the transform).
Transform = Callable[[F, Leaves, Leaves, Leaves], Leaves]
SHARED: dict[str, tuple[str, Transform]] = {
    "value": ("output", lambda f, x, u, v: f(x)),
    "vjp": ("input", lambda f, x, u, v: pull(f, x, v)),
    "jvp": ("output", lambda f, x, u, v: push(f, x, u)),
    "vmap": ("output", lambda f, x, u, v: vmap(f)(lanes(x))),
    "vmap of one leaf": ("output", lambda f, x, u, v: first_batched(f, x)),
    "vmap of grad": ("input", lambda f, x, u, v: vmap(pull_at(f, v))(lanes(x))),
    "vmap of pull-back": ("input", lambda f, x, u, v: vmap(lambda w: pull(f, x, w))(lanes(v))),
    "grad of vmap": ("input", lambda f, x, u, v: pull(vmap(f), lanes(x), lanes(v))),
    "jvp of vmap": ("output", lambda f, x, u, v: push(vmap(f), lanes(x), lanes(u))),
    "vmap of jvp": ("output", lambda f, x, u, v: vmap(lambda w: push(f, x, w))(lanes(u))),
    "vmap of vmap": ("output", lambda f, x, u, v: vmap(vmap(f))(lanes(lanes(x)))),
    "jvp of grad": ("input", lambda f, x, u, v: push(pull_at(f, v), x, u)),
    "grad of grad": ("input", lambda f, x, u, v: pull(pull_at(f, v), x, u)),
    "jvp of jvp": ("output", lambda f, x, u, v: push(lambda x: push(f, x, u), x, u)),
    "grad of jvp": ("input", lambda f, x, u, v: pull(lambda x: push(f, x, u), x, v)),
    "jvp of jvp of grad": (
        "input",
        lambda f, x, u, v: push(lambda x: push(pull_at(f, v), x, u), x, u),
    ),
    "vmap of jvp of grad": (
        "input",
        lambda f, x, u, v: vmap(lambda w: push(pull_at(f, v), x, w))(lanes(u)),
    ),
    "vmap of grad of grad": (
        "input",
        lambda f, x, u, v: vmap(lambda x: pull(pull_at(f, v), x, u))(lanes(x)),
    ),
}


def total(f: F) -> Callable[[Leaves], Tensor]:
    """One number: the sum of all that f computes."""
    return lambda x: torch.stack([y.sum() for y in f(x)]).sum()


def local_matrices(f: F, x: Leaves) -> dict[str, list[list[Tensor]]]:
    """Jacobians of a rank's program, ``[rows, columns]`` for each pair of leaves."""
    return {
        "jacrev": jacrev(f)(x),
        "jacfwd": jacfwd(f)(x),
        "hessian": hessian(total(f))(x),
        "jacrev of grad": jacrev(torch.func.grad(total(f)))(x),
    }


class Matrices(NamedTuple):
    """Jacobians of all ranks, ``[ranks, rows, columns]`` for each pair of leaves.

    Each belongs to the ranks that hold one of the two leaves, on one side of f.
    """

    side: str
    owner: Literal["row", "column"]
    pairs: list[list[Tensor]]


def dense_matrices(f: F, x: Leaves, ones: Leaves) -> dict[str, Matrices]:
    """The same for all ranks; ``ones`` marks the rows of the output that count."""
    gradient = pull_at(f, ones)
    alike = [torch.ones_like(a) for a in x]
    return {
        "jacrev": Matrices("input", "column", _by_rows(f, x, ones)),
        "jacfwd": Matrices("output", "row", _by_columns(f, x, alike)),
        "hessian": Matrices("input", "row", _by_columns(gradient, x, alike)),
        "jacrev of grad": Matrices("input", "column", _by_rows(gradient, x, alike)),
    }


def _basis(ones: Leaves) -> list[Leaves]:
    """For each leaf, lanes that move one of its numbers, on all ranks at once."""
    units = [torch.eye(a.shape[-1], dtype=a.dtype).unsqueeze(1) * a for a in ones]
    zeros = [torch.zeros_like(unit) for unit in units]
    return [[*zeros[:i], unit, *zeros[i + 1 :]] for i, unit in enumerate(units)]


def _by_rows(f: F, x: Leaves, ones: Leaves) -> list[list[Tensor]]:
    back = vjp(f, x)[1]
    rows = [vmap(lambda v: back(v)[0])(basis) for basis in _basis(ones)]
    return [[a.movedim(0, 1) for a in row] for row in rows]


def _by_columns(f: F, x: Leaves, ones: Leaves) -> list[list[Tensor]]:
    columns = [vmap(lambda u: push(f, x, u))(basis) for basis in _basis(ones)]
    return [[a.movedim(0, -1) for a in row] for row in zip(*columns, strict=True)]


def plain_autograd(f: F, x: Sequence[Tensor], u: Leaves, v: Leaves) -> dict[str, Any]:
    """The first and second derivative by ``backward``, without torch.func."""
    leaves = [a.detach().requires_grad_() for a in x]
    ys = f(leaves)
    first = torch.autograd.grad(ys, leaves, v, create_graph=True)
    second = torch.autograd.grad(first, leaves, u)
    return {"vjp": [a.detach() for a in first], "grad of grad": list(second)}
