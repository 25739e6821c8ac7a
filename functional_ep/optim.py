"""Optimizers: pure pairs of ``init`` and ``update`` that hold moments only.

Every hyperparameter is a number or a schedule of the step, so that no label's learning rate can go
stale. ``update`` works on lists of shards; it is elementwise, so it commutes with sharding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sharding import Plan

from .fused import fused_adamw
from .schedules import Schedule, at
from .wide import wide

Moments = dict[str, dict[str, Tensor]]
Leaves = list[Tensor]


class Update(Protocol):
    """``params', moments' = update(step, params, grads, moments, donate, factor)``.

    Lists in one order: parameters, gradients and, by name, moments. With a ``factor``, a scalar,
    the gradient is ``factor * grads``, and the list and its tensors are the update's to write into.
    """

    def __call__(
        self,
        step: Tensor,
        params: Leaves,
        grads: Leaves,
        moments: dict[str, Leaves],
        donate: bool,
        factor: Tensor | None = None,
    ) -> tuple[Leaves, dict[str, Leaves]]: ...


class Optimizer(NamedTuple):
    """``moments = init(params)``, ``params, moments = update(step, params, grads, moments, ...)``.

    ``init`` maps ``{path: shard}`` to ``{moment: {path: tensor}}``. ``update`` is an
    :class:`Update`. It returns new tensors; with ``donate`` it writes into the given ones, to the
    same bits. ``rate`` is the learning rate's schedule. ``factored`` says that gradients of experts
    may come as :class:`Factored`.

    >>> params, gradients = [torch.ones(2)], [torch.ones(2)]
    >>> sgd(0.1).update(torch.tensor(0), params, gradients, {}, False)[0]
    [tensor([0.9000, 0.9000])]
    """

    init: Callable[[dict[str, Tensor]], Moments]
    update: Update
    rate: Schedule
    factored: bool = False


def by_label(optimizers: Optimizer | Mapping[str, Optimizer], plan: Plan) -> dict[str, Optimizer]:
    """An optimizer for each label in use that is not frozen.

    Raises:
        ValueError: labels and optimizers that do not match; both sets are named.
    """
    if isinstance(optimizers, Optimizer):
        _check_update(optimizers, "the optimizer")
        return dict.fromkeys(plan.trained, optimizers)
    if not isinstance(optimizers, Mapping):
        raise TypeError(
            f"optimizers are {optimizers!r}: adamw(...), sgd(...), or a dict of them by label"
        )
    if set(optimizers) != set(plan.trained):
        frozen = f" (frozen: {sorted(plan.frozen)})" if plan.frozen else ""
        raise ValueError(
            f"optimizers are given for {sorted(optimizers)}, but the labels to train are "
            f"{sorted(plan.trained)}{frozen}: give one for each of them, or a single one for all"
        )
    for label, optimizer in optimizers.items():
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizers[{label!r}] is {optimizer!r}: an Optimizer is needed")
        _check_update(optimizer, f"optimizers[{label!r}]")
    return {label: optimizers[label] for label in plan.trained}


def _check_update(optimizer: Optimizer, name: str) -> None:
    """Refuse an update of one's own that cannot be called as updates are."""
    try:
        inspect.signature(optimizer.update).bind(*range(6))
    except TypeError as error:
        raise TypeError(
            f"{name}: update is called as update(step, params, grads, moments, donate, factor), "
            f"and this one has {error}"
        ) from None


def sgd(
    lr: float | Schedule,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float | Schedule = 0.0,
) -> Optimizer:
    """``m' = momentum m + g + wd p;  p' = p - lr m'``, or ``p - lr (g + wd p + momentum m')``.

    The same as ``torch.optim.SGD``; the second form is Nesterov's.

    Raises:
        ValueError: Nesterov without momentum; a number below zero.

    >>> step, p, g = torch.tensor(0), [torch.ones(1)], [torch.ones(1)]
    >>> sgd(0.1).update(step, p, g, {}, False)[0]
    [tensor([0.9000])]
    """
    if nesterov and not momentum:
        raise ValueError("sgd: nesterov=True needs a momentum greater than 0")
    _check_range("sgd", math.inf, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def init(params: dict[str, Tensor]) -> Moments:
        return {"m": _zeros(params)} if momentum else {}

    def update(
        step: Tensor,
        params: Leaves,
        grads: Leaves,
        moments: dict[str, Leaves],
        donate: bool,
        factor: Tensor | None = None,
    ) -> tuple[Leaves, dict[str, Leaves]]:
        rate, decay = at(lr, step), at(weight_decay, step)
        new: Leaves = []
        ms: Leaves = []
        for i, (p, g) in enumerate(zip(params, _scaled(grads, factor), strict=True)):
            x = wide(p)
            d = g + decay.to(x.dtype) * x if weight_decay else g
            if momentum:
                m = momentum * wide(moments["m"][i]) + d
                ms.append(_settle(moments["m"][i], m, donate))
                d = d + momentum * m if nesterov else m
            new.append(_settle(p, x - rate.to(x.dtype) * d, donate))
        return new, {"m": ms} if momentum else {}

    return Optimizer(init, update, lambda step: at(lr, step))


def adamw(
    lr: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.1,
) -> Optimizer:
    """``p' = (1 - lr wd) p - lr m^ / (sqrt(v^) + eps)``, as ``torch.optim.AdamW``.

    ``m' = b1 m + (1 - b1) g``, ``v' = b2 v + (1 - b2) g^2``, and ``^`` divides by ``1 - b^t``.
    Source: Loshchilov, Hutter, Decoupled Weight Decay Regularization, 2019.

    Raises:
        ValueError: a number below zero; b1 or b2 that is not below one.

    >>> step, p, g = torch.tensor(0), [torch.ones(1)], [torch.ones(1)]
    >>> zeros = {"m": [torch.zeros(1)], "v": [torch.zeros(1)]}
    >>> adamw(0.1, weight_decay=0.0).update(step, p, g, zeros, False)[0]
    [tensor([0.9000])]
    """
    _check_range("adamw", math.inf, lr=lr, eps=eps, weight_decay=weight_decay)
    _check_range("adamw", 1.0, b1=b1, b2=b2)

    def init(params: dict[str, Tensor]) -> Moments:
        return {"m": _zeros(params), "v": _zeros(params)}

    def update(
        step: Tensor,
        params: Leaves,
        grads: Leaves,
        moments: dict[str, Leaves],
        donate: bool,
        factor: Tensor | None = None,
    ) -> tuple[Leaves, dict[str, Leaves]]:
        rate, decay = at(lr, step), at(weight_decay, step)
        if torch._C._are_functorch_transforms_active():
            scaled = list(_scaled(grads, factor))
            return _adamw_formula(step, params, scaled, moments, (rate, decay, b1, b2, eps))
        own = list if donate else _copies
        p, m, v = own(params), own(moments["m"]), own(moments["v"])
        hyper = dict(lr=float(rate), beta1=b1, beta2=b2, weight_decay=float(decay), eps=eps)
        fused_adamw(step, (p, grads, m, v), hyper, factor)
        return p, {"m": m, "v": v}

    return Optimizer(init, update, lambda step: at(lr, step), factored=True)


Hyper = tuple[Tensor, Tensor, float, float, float]


def _adamw_formula(
    step: Tensor, params: Leaves, grads: Leaves, moments: dict[str, Leaves], hyper: Hyper
) -> tuple[Leaves, dict[str, Leaves]]:
    """The same update in differentiable operations, for use under transforms."""
    rate, decay, b1, b2, eps = hyper
    t = (step + 1).to(torch.float64)
    correct1, correct2 = 1 - b1**t, 1 - b2**t
    ps: Leaves = []
    ms: Leaves = []
    vs: Leaves = []
    for p, g, m, v in zip(params, grads, moments["m"], moments["v"], strict=True):
        x = wide(p)
        first = wide(m) + (1 - b1) * (g - wide(m))
        second = b2 * wide(v) + (1 - b2) * g * g
        root = _root(second / correct2.to(x.dtype)) + eps
        decayed = x * (1 - rate * decay).to(x.dtype)
        new = decayed - (rate / correct1).to(x.dtype) * first / root
        for leaves, old, value in (ps, p, new), (ms, m, first), (vs, v, second):
            leaves.append(value.to(old.dtype))
    return ps, {"m": ms, "v": vs}


def _root(v: Tensor) -> Tensor:
    """The square root, with the derivative zero at zero, where v is the square of a gradient."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def _check_range(name: str, end: float, **numbers: float | Schedule) -> None:
    """Refuse numbers below zero, from the end on, or nan; what a schedule gives is its own."""
    for parameter, value in numbers.items():
        if not callable(value) and not 0 <= value < end:
            limit = "" if end == math.inf else f" and below {end:g}"
            raise ValueError(f"{name}: {parameter}={value}: a number from 0 on{limit}")


def _scaled(grads: Leaves, factor: Tensor | None) -> Iterator[Tensor]:
    """``factor * g``, wide, one at a time: one over the count of tokens is 0 in half precision."""
    for g in map(wide, grads):
        yield g if factor is None else g * factor.to(g.dtype)


def _zeros(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: torch.zeros_like(p) for path, p in params.items()}


def _copies(xs: Leaves) -> Leaves:
    return [x.clone() for x in xs]


def _settle(old: Tensor, new: Tensor, donate: bool) -> Tensor:
    return old.copy_(new) if donate else new.to(old.dtype)
