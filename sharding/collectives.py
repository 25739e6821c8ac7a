"""Differentiable collectives, each a linear map with its transpose, written once as a table.

    all_gather  <->  reduce_scatter        concatenate            sum and slice
    psum        <->  pvary                 sum over copies        the same value on every copy
    all_to_all  <->  all_to_all            send, receive          receive, send

A value is *varying* along an axis when its ranks hold different numbers, and *one* value, counted
once, when they hold copies of it. ``psum`` takes the first to the second and ``pvary`` back; so the
transpose of summing is copying and nothing is ever divided.

Every collective is ``wait(start(x))``. The transpose of ``start`` is ``wait`` of the partner and
the transpose of ``wait`` is ``start`` of the partner: what ran ahead of the compute in the forward
pass finishes behind it in the backward pass, without hooks. Both halves are closed under ``grad``,
``vjp``, ``jvp``, ``vmap`` and their compositions, and under plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch._C._functorch as _functorch
from torch import Tensor

from .comm import Comm, Done, Op, Work
from .mesh import Axes
from .node import Node


class Linear(Protocol):
    """A linear map between lists of tensors on all ranks, which travels; a row of the table.

    Dims that follow those the map knows of are carried along: that is how it is batched.
    """

    def start(self, xs: list[Tensor], comm: Comm) -> Work:
        """Set the map going; it must not modify its inputs."""
        ...

    @property
    def transpose(self) -> Linear:
        """The map that reverse mode applies to cotangents."""
        ...


class Collective(NamedTuple):
    """A raw collective as a linear map."""

    op: Op

    def start(self, xs: list[Tensor], comm: Comm) -> Work:
        return comm.start(self.op, xs)

    @property
    def transpose(self) -> Linear:
        kind, axes, send, receive, of = self.op
        if kind == "all_gather":
            return Collective(Op("reduce_scatter", axes, of=of))
        if kind == "reduce_scatter":
            return Collective(Op("all_gather", axes, of=of))
        if kind == "all_to_all":
            return Collective(Op("all_to_all", axes, send=receive, receive=send, of=of))
        return Vary(axes)


class Vary(NamedTuple):
    """The identity on each copy; its transpose is their sum."""

    axes: Axes

    def start(self, xs: list[Tensor], comm: Comm) -> Work:
        comm.mesh.check(self.axes)
        return Done(xs)

    @property
    def transpose(self) -> Linear:
        return Collective(Op("all_reduce", self.axes))


def start(linear: Linear, xs: Sequence[Tensor], comm: Comm) -> Tensor:
    """Set a linear map going and return a ticket for it, to be awaited exactly once."""
    return _Start.apply(linear, comm, (), *xs)


def wait(linear: Linear, ticket: Tensor, comm: Comm) -> tuple[Tensor, ...]:
    """The result of the linear map that :func:`start` gave this ticket for."""
    return _Wait.apply(linear, comm, ticket)


def forget(ticket: Tensor, comm: Comm) -> None:
    """Let go of a transfer that nobody will wait for, as after an error."""
    while _functorch.is_functorch_wrapped_tensor(ticket):
        ticket = _functorch.get_unwrapped(ticket)
    comm.in_flight.pop(ticket.data_ptr(), None)


class _Start(Node):
    """``xs -> ticket``. The ticket carries derivatives; its address finds the transfer.

    Its shape is ``(1, *lanes)``, with a dim for each vmap that xs are mapped by: what autograd does
    on the way to ``wait`` and back may permute a ticket, but must not copy it.
    """

    @staticmethod
    def forward(linear: Linear, comm: Comm, lanes: tuple[int, ...], *xs: Tensor) -> Tensor:
        ticket = torch.zeros((1, *lanes), device=xs[0].device if xs else None)
        comm.in_flight[ticket.data_ptr()] = linear.start(list(xs), comm)
        return ticket

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.linear, ctx.comm, ctx.lanes = inputs[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *wait(ctx.linear.transpose, grads[0], ctx.comm)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        moving = [t for t in tangents[3:] if t is not None]  # integers have no tangent
        return _Start.apply(ctx.linear, ctx.comm, ctx.lanes, *moving)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        linear, comm, lanes, *xs = args
        last = [
            x.unsqueeze(-1).expand(*x.shape, info.batch_size) if dim is None else x.movedim(dim, -1)
            for x, dim in zip(xs, in_dims[3:], strict=True)
        ]
        lanes = (*lanes, info.batch_size)
        return _Start.apply(linear, comm, lanes, *last), len(lanes)


class _Wait(Node):
    """``ticket -> ys``."""

    @staticmethod
    def forward(linear: Linear, comm: Comm, ticket: Tensor) -> tuple[Tensor, ...]:
        if ticket.data_ptr() not in comm.in_flight:
            raise RuntimeError(f"{linear}: no such transfer is under way; each is awaited once")
        ys = comm.in_flight.pop(ticket.data_ptr()).wait()
        # What did not travel is the input itself; autograd wants an output of its own.
        return tuple(y.view_as(y) for y in ys)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.linear, ctx.comm, ticket = inputs
        ctx.lanes = tuple(ticket.shape[1:])
        ctx.moving = [y.is_floating_point() for y in output]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, _Start.apply(ctx.linear.transpose, ctx.comm, ctx.lanes, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        ys = iter(wait(ctx.linear, tangents[2], ctx.comm))
        return tuple(next(ys) if moves else None for moves in ctx.moving)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        linear, comm, ticket = args
        ys = wait(linear, ticket.movedim(in_dims[2], -1), comm)
        return ys, tuple(y.dim() - 1 for y in ys)


def apply(linear: Linear, xs: Sequence[Tensor], comm: Comm) -> tuple[Tensor, ...]:
    """``wait(start(xs))``: a linear map over all ranks, differentiable to any order."""
    return wait(linear, start(linear, xs, comm), comm)


def all_gather(x: Tensor, axes: Axes, comm: Comm) -> Tensor:
    """``[k, ...] -> [n k, ...]``, concatenated in fiber order; transpose: :func:`reduce_scatter`.

    Args:
        x: this rank's part; the same shape on every rank of the fiber.
        axes: the mesh axes to gather along, a tuple of names.
        comm: the ranks.

    Raises:
        ValueError: an axis not on the mesh, or a scalar.

    >>> from sharding import Mesh, simulate
    >>> gather = lambda comm, x: all_gather(x, ("ep",), comm)
    >>> simulate(gather, Mesh(ep=2), [torch.tensor([1.0]), torch.tensor([2.0])])[0]
    tensor([1., 2.])
    """
    return apply(Collective(Op("all_gather", axes)), [x], comm)[0]


def reduce_scatter(x: Tensor, axes: Axes, comm: Comm) -> Tensor:
    """``[n k, ...] -> [k, ...]``: this rank's slice of the sum; transpose: :func:`all_gather`.

    Raises:
        ValueError: an axis not on the mesh, or a dim 0 that the fiber does not divide.

    >>> from sharding import Mesh, simulate
    >>> simulate(lambda comm: reduce_scatter(torch.ones(2), ("ep",), comm), Mesh(ep=2))[0]
    tensor([2.])
    """
    return apply(Collective(Op("reduce_scatter", axes)), [x], comm)[0]


def psum(x: Tensor, axes: Axes, comm: Comm) -> Tensor:
    """``sum over the fiber of x``, one value on every rank; transpose: :func:`pvary`.

    The result counts once: a loss that all ranks compute from it has the gradient of one loss, not
    of as many as there are ranks.

    >>> from sharding import Mesh, simulate
    >>> simulate(lambda comm: psum(torch.tensor(1.0), ("ep",), comm), Mesh(ep=4))[0]
    tensor(4.)
    """
    return apply(Collective(Op("all_reduce", axes)), [x], comm)[0]


def pvary(x: Tensor, axes: Axes, comm: Comm) -> Tensor:
    """``x`` itself, no longer one value but one on each copy; transpose: :func:`psum`.

    Whatever is the same on all ranks of a fiber and meets data that differs there passes through
    ``pvary``, so that its gradient is summed over them.

    >>> from sharding import Mesh, simulate
    >>> program = lambda comm, x: torch.func.grad(lambda w: pvary(w, ("ep",), comm) * x)(x * 0)
    >>> simulate(program, Mesh(ep=2), torch.tensor([1.0, 2.0]))
    [tensor(3.), tensor(3.)]
    """
    return apply(Vary(axes), [x], comm)[0]


def all_to_all(
    x: Tensor, axes: Axes, comm: Comm, send: Sequence[int], receive: Sequence[int]
) -> Tensor:
    """``send[i]`` rows go to, ``receive[i]`` come from, the i-th rank; transpose: the way back.

    Raises:
        ValueError: an axis not on the mesh, or splits that do not fit the rows or the fiber.

    >>> from sharding import Mesh, simulate
    >>> swap = lambda comm: all_to_all(torch.full((2,), comm.rank), ("ep",), comm, [1, 1], [1, 1])
    >>> simulate(swap, Mesh(ep=2))[0]
    tensor([0, 1])
    """
    op = Op("all_to_all", axes, tuple(send), tuple(receive))
    return apply(Collective(op), [x], comm)[0]
