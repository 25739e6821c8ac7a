"""Rules: where a leaf lives on the mesh. Data, from which everything else is derived."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mesh import Axes, Mesh

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """``shard = pad(ravel(x)[lo:hi])``: which mesh axes split a leaf, and when.

    Every other axis of the mesh holds copies. Only the names are given; sizes, intervals, gathers
    and reductions follow from them, so that nothing can contradict.

    Args:
        compute: axes that split dim 0 also while computing: each rank's *view* is a slice.
        store: axes that split what is left, ravelled and padded, between steps; computing gathers
            it again.

    Raises:
        TypeError: anything but tuples of axis names.
        ValueError: an axis named twice.

    >>> Rule(compute=("ep",), store=("edp",))
    Rule(compute=('ep',), store=('edp',))
    >>> Rule(store="edp")
    Traceback (most recent call last):
      ...
    TypeError: Rule(store='edp'): a tuple of axis names is needed: write ('edp',)
    """

    compute: Axes = ()
    store: Axes = ()

    def __post_init__(self) -> None:
        for role, axes in (("compute", self.compute), ("store", self.store)):
            if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
                hint = f": write ({axes!r},)" if isinstance(axes, str) else ""
                raise TypeError(f"Rule({role}={axes!r}): a tuple of axis names is needed{hint}")
        twice = [axis for axis in self.axes if self.axes.count(axis) > 1]
        if twice:
            raise ValueError(f"{self}: axis {twice[0]!r} is named twice; it splits a leaf once")

    @property
    def axes(self) -> Axes:
        """Every axis that splits the leaf."""
        return self.compute + self.store

    def copies(self, mesh: Mesh) -> Axes:
        """The axes along which all ranks hold the same shard."""
        return mesh.rest(self.axes)


def zero3(*axes: str) -> Rule:
    """Split between steps, whole while computing: ZeRO-3, also called fully sharded data parallel.

    >>> zero3("edp", "ep")
    Rule(compute=(), store=('edp', 'ep'))
    """
    return Rule(store=axes)


def expert_parallel(*axes: str, store: Axes = ()) -> Rule:
    """Dim 0, the experts, split also while computing; each slice split over ``store`` in between.

    >>> expert_parallel("ep", store=("edp",))
    Rule(compute=('ep',), store=('edp',))
    """
    return Rule(compute=axes, store=store)


def replicated() -> Rule:
    """Whole on every rank.

    >>> replicated()
    Rule(compute=(), store=())
    """
    return Rule()


def view_shape(rule: Rule, mesh: Mesh, shape: Shape) -> Shape:
    """The shape that computing sees: dim 0 divided by the compute axes, every other dim whole.

    Raises:
        ValueError: the compute axes do not divide dim 0.

    >>> view_shape(expert_parallel("ep"), Mesh(ep=4), (8, 3))
    (2, 3)
    """
    ranks = mesh.count(rule.compute)
    if ranks == 1:
        return tuple(shape)
    if not shape or shape[0] % ranks:
        raise ValueError(
            f"dim 0 of {tuple(shape)} does not divide by the {ranks} ranks of the compute axes "
            f"{rule.compute} of {mesh}"
        )
    return (shape[0] // ranks, *shape[1:])


def shard_size(rule: Rule, mesh: Mesh, shape: Shape) -> int:
    """The number of entries of a shard, padding included; the same on every rank.

    >>> shard_size(zero3("edp"), Mesh(edp=4), (3, 3))
    3
    """
    return -(-math.prod(view_shape(rule, mesh, shape)) // mesh.count(rule.store))


def interval(rule: Rule, mesh: Mesh, rank: int, shape: Shape) -> tuple[int, int]:
    """``(lo, hi)``: a shard is this one contiguous interval of the ravelled global leaf.

    True of every rule on every mesh; checkpoints, resharding and weight import rest on it.

    >>> [interval(zero3("edp"), Mesh(edp=4), rank, (3, 3)) for rank in range(4)]
    [(0, 3), (3, 6), (6, 9), (9, 9)]
    >>> [interval(Rule(("ep",), ("edp",)), Mesh(edp=2, ep=2), rank, (4, 2)) for rank in range(4)]
    [(0, 2), (4, 6), (2, 4), (6, 8)]
    """
    size = math.prod(view_shape(rule, mesh, shape))
    shard = shard_size(rule, mesh, shape)
    start, place = mesh.index(rank, rule.compute) * size, mesh.index(rank, rule.store)
    return start + min(place * shard, size), start + min((place + 1) * shard, size)


def partition(rule: Rule, mesh: Mesh, rank: int, x: Tensor) -> Tensor:
    """``pad(ravel(x)[lo:hi])``: global leaf to shard ``(shard_size,)``, a tensor of its own.

    Differentiable; but of a leaf of autograd's, as parameters are, the shard is a leaf of its own.

    >>> partition(zero3("edp"), Mesh(edp=2), 1, torch.arange(3))
    tensor([2, 0])
    """
    lo, hi = interval(rule, mesh, rank, tuple(x.shape))
    missing = shard_size(rule, mesh, tuple(x.shape)) - (hi - lo)
    shard = torch.nn.functional.pad(x.reshape(-1)[lo:hi], (0, missing))
    computed = x.grad_fn is not None or torch._C._are_functorch_transforms_active()
    return shard if computed else shard.detach()


def unpartition(rule: Rule, mesh: Mesh, shards: Sequence[Tensor], shape: Shape) -> Tensor:
    """The global leaf from the shards of all ranks, in order: the inverse of :func:`partition`.

    >>> mesh, rule, x = Mesh(edp=2, ep=2), expert_parallel("ep", store=("edp",)), torch.arange(6)
    >>> unpartition(rule, mesh, [partition(rule, mesh, rank, x) for rank in mesh], (6,))
    tensor([0, 1, 2, 3, 4, 5])
    """
    flat = shards[0].new_empty(math.prod(shape))
    for rank, shard in enumerate(shards):
        lo, hi = interval(rule, mesh, rank, shape)
        flat[lo:hi] = shard[: hi - lo]
    return flat.view(shape)


def is_first_copy(rule: Rule, mesh: Mesh, rank: int) -> bool:
    """Whether ``rank`` is the one copy of its shard that sums over the mesh count.

    >>> [is_first_copy(expert_parallel("ep"), Mesh(edp=2, ep=2), rank) for rank in range(4)]
    [True, True, False, False]
    """
    coords = mesh.coords(rank)
    return all(coords[axis] == 0 for axis in rule.copies(mesh))
