"""closed(f): a function as one node of the graph, under every transform."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch._C._functorch as _functorch
from torch import Tensor

from .captured import captured
from .node import Node, accept, accepted
from .streams import stand, standing

Flat = Callable[..., tuple[Tensor, ...]]
Lanes = Literal["vmap", "loop"]


def closed(f: Flat, lanes: Lanes = "vmap") -> Flat:
    """``closed(f) = f``, keeping nothing but the inputs: derivatives run ``f`` again.

    ``grad``, ``jvp`` and ``vmap`` of a closed function are closed functions again, so compositions
    are too, to any order. The random numbers of torch's default generators replay.

    Args:
        f: from tensors to a tuple of tensors; integer ones pass without derivative.
        lanes: how to map over a batch: ``"vmap"`` maps f; ``"loop"`` calls it once per lane, for
            functions whose shapes depend on data.

    Raises:
        ValueError: f captures a tensor that takes part in differentiation, whose gradient would be
            lost without a word, or a generator, which would give other numbers when f runs again.
            Where is looked, and where not: :func:`sharding.captured.captured`.

    >>> square = closed(lambda x: (x * x,))
    >>> torch.func.hessian(lambda x: square(x)[0])(torch.tensor(3.0))
    tensor(2.)
    """
    for name, x in captured(f):
        if isinstance(x, torch.Generator):
            raise ValueError(
                f"{getattr(f, '__name__', f)} draws from the generator {name!r}, and would draw "
                "other numbers when it is run again: use torch's default generators, which are put "
                "back, or make one inside of the function, from a seed that is an argument"
            )
        if x.requires_grad or _functorch.is_functorch_wrapped_tensor(x):
            raise ValueError(
                f"{getattr(f, '__name__', f)} captures the tensor {name!r} {tuple(x.shape)}, whose "
                "gradient would be lost: wrong: closed(lambda x: x @ w)(x); right: "
                "closed(lambda x, w: x @ w)(x, w)"
            )

    def call(*xs: Tensor) -> tuple[Tensor, ...]:
        return _Closed.apply(_Replayed(f), lanes, *xs)

    return call


def pull_back(
    f: Flat,
    xs: Sequence[Tensor],
    grads: Sequence[Tensor],
    wanted: Sequence[int] | None = None,
    accepts: Sequence[frozenset[str]] = (),
) -> tuple[Tensor, ...]:
    """``vjp(f, *xs)[1](*grads)``: the cotangents of the wanted inputs, or of all floating ones.

    Plain autograd where no transform is active and nothing is differentiated again (it costs less
    Python per operation), torch.func otherwise; the bits are the same. ``accepts`` are the kinds of
    tensor that each input's cotangent may be (:func:`sharding.node.accept`).
    """
    wanted = _floating(xs) if wanted is None else wanted

    def of_wanted(*chosen: Tensor) -> tuple[Tensor, ...]:
        every = list(xs)
        for i, x in zip(wanted, chosen, strict=True):
            every[i] = x
        ys = f(*every)
        return tuple(ys[i] for i in _floating(ys))

    if torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
        return torch.func.vjp(of_wanted, *(xs[i] for i in wanted))[1](tuple(grads))
    with torch.enable_grad():
        leaves = [xs[i].detach().requires_grad_() for i in wanted]
        kinds = [accepts[i] if accepts else frozenset[str]() for i in wanted]
        edges = [accept(leaf, kind) for leaf, kind in zip(leaves, kinds, strict=True) if kind]
        ys = of_wanted(*leaves)
    live = [(y, g) for y, g in zip(ys, grads, strict=True) if y.requires_grad]
    outs, cotangents = [y for y, _ in live], [g for _, g in live]
    found = torch.autograd.grad(outs, leaves, cotangents, materialize_grads=True)
    del edges
    return found


class _Replayed:
    """A function that, called again, draws the same random numbers and casts to the same dtypes."""

    def __init__(self, f: Flat) -> None:
        self.f = f
        self.start: list[Tensor] | None = None
        self.casts: dict[str, torch.dtype] = {}

    def __call__(self, *xs: Tensor) -> tuple[Tensor, ...]:
        if self.start is None:
            self.start, self.casts = stand(), _casts()
            return self.f(*xs)
        with standing(self.start), _casting(self.casts):
            return self.f(*xs)


def _casts() -> dict[str, torch.dtype]:
    """The kinds of device for which autocast is on, and the dtype that it casts to."""
    kinds = ("cpu", "cuda")
    return {k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)}


@contextmanager
def _casting(casts: dict[str, torch.dtype]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in {**casts, **_casts()}:
            stack.enter_context(torch.autocast(kind, casts.get(kind), enabled=kind in casts))
        yield


class _Closed(Node):
    @staticmethod
    def forward(f: Flat, lanes: Lanes, *xs: Tensor) -> tuple[Tensor, ...]:
        # An output that is an input must be a view of it: autograd wants a tensor of its own.
        return tuple(y.view_as(y) if any(y is x for x in xs) else y for y in f(*xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.f, ctx.lanes, *xs = inputs
        ctx.floating, ctx.outputs = _floating(output), len(output)
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        xs = [_functorch.unwrap_if_dead(x) for x in ctx.saved_tensors]
        live = [grads[i] for i in ctx.floating]
        f, n = ctx.f, len(xs)
        wanted = [i for i in _floating(xs) if ctx.needs_input_grad[2 + i]]
        if torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
            again = closed(lambda *args: pull_back(f, args[:n], args[n:], wanted), ctx.lanes)
            found = again(*xs, *live)
        else:
            accepts = [accepted(node) for node, _ in ctx.next_functions]
            found = pull_back(f, xs, live, wanted, accepts)
        result: list[Tensor | None] = [None] * n
        for i, g in zip(wanted, found, strict=True):
            result[i] = g
        return None, None, *result

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        xs, f = ctx.saved_tensors, ctx.f
        wanted, n = _floating(xs), len(xs)
        given = tangents[2:]
        dxs = [given[i] if given[i] is not None else torch.zeros_like(xs[i]) for i in wanted]

        def push_forward(*args: Tensor) -> tuple[Tensor, ...]:
            def of_wanted(*chosen: Tensor) -> tuple[Tensor, ...]:
                every = list(args[:n])
                for i, x in zip(wanted, chosen, strict=True):
                    every[i] = x
                return f(*every)

            # A dual tensor cannot be made of an expanded one, which a cotangent often is.
            primals = tuple(args[i].contiguous() for i in wanted)
            dys = torch.func.jvp(of_wanted, primals, tuple(args[n:]))[1]
            return tuple(dys[i] for i in ctx.floating)

        found = iter(closed(push_forward, ctx.lanes)(*xs, *dxs))
        return tuple(next(found) if i in ctx.floating else None for i in range(ctx.outputs))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        f, lanes, *xs = args
        dims = in_dims[2:]
        if lanes == "vmap":
            mapped = torch.vmap(f, dims, randomness=info.randomness)
            ys = closed(mapped, lanes)(*xs)
        else:
            lane = closed(f, lanes)
            each = [
                lane(*(x if d is None else x.select(d, b) for x, d in zip(xs, dims, strict=True)))
                for b in range(info.batch_size)
            ]
            ys = tuple(torch.stack(column) for column in zip(*each, strict=True))
        return ys, (0,) * len(ys)


def _floating(xs: Sequence[Tensor]) -> list[int]:
    return [i for i, x in enumerate(xs) if x.is_floating_point()]


def is_mapped(x: Tensor) -> bool:
    """Whether some vmap maps over x, under whatever other transforms.

    >>> seen = []
    >>> _ = torch.vmap(lambda x: (seen.append(is_mapped(x)), x)[1])(torch.ones(2))
    >>> seen, is_mapped(torch.ones(2))
    ([True], False)
    """
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False
