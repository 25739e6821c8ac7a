"""Order: a digest of the collectives that a rank starts, to be compared with those of others.

A transport sees one collective at a time, and of two that look alike and have no name, ``Op.of``,
it cannot tell which is which. So ranks that exchange them unseen go on, with numbers that belong to
something else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from hashlib import blake2b
from itertools import combinations

from torch import Tensor

from .comm import Op, Work
from .mesh import Axes, Mesh


class Order:
    """Hears what a rank starts: ranks that start the same, in the same order, have equal digests.

    One digest must be that of every rank: kinds, axes, dtypes and dims of all collectives, and the
    lines of the program that start them. Sizes and names have to agree only within the fiber that a
    collective runs over, so they have a digest for each set of axes. How many rows an all_to_all
    moves is in none.

    >>> import torch
    >>> from sharding import simulate
    >>> def program(comm):
    ...     order = Order(comm.mesh)
    ...     with comm.heard_by(order):
    ...         comm.all_reduce([torch.ones(1 + comm.rank // 2)], ("ep",))
    ...     return order.digests()
    >>> first, _, third, _ = simulate(program, Mesh(edp=2, ep=2))
    >>> first.keys(), [axes for axes in first if first[axes] != third[axes]]
    (dict_keys([(), ('edp',), ('ep',), ('edp', 'ep')]), [('ep',)])
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sequence = blake2b(digest_size=8)
        self._sizes = {axes: blake2b(digest_size=8) for axes in sets_of_axes(mesh)}
        self._set_of = {frozenset(axes): axes for axes in self._sizes}

    def __call__(self, op: Op, xs: Sequence[Tensor], work: Work) -> Work:
        kinds = [(x.dtype, x.dim()) for x in xs]
        self._sequence.update(f"{op.kind} {op.axes} {kinds} {_line()};".encode())
        axes = self._set_of.get(frozenset(op.axes))
        if axes is not None:  # else of another arrangement of the ranks
            skip = 1 if op.kind == "all_to_all" else 0
            shapes = [tuple(x.shape[skip:]) for x in xs]
            self._sizes[axes].update(f"{op.of!r} {shapes};".encode())
        return work

    def digests(self) -> dict[Axes, int]:
        """Signed 64-bit numbers. That of no axes is for all ranks, the others for their fibers."""
        every = {(): self._sequence, **self._sizes}
        return {
            axes: int.from_bytes(h.digest(), "little", signed=True) for axes, h in every.items()
        }


def sets_of_axes(mesh: Mesh) -> list[Axes]:
    """Every set of axes along which there is another rank.

    >>> sets_of_axes(Mesh(edp=2, tp=1, ep=2))
    [('edp',), ('ep',), ('edp', 'ep')]
    """
    axes = [axis for axis in mesh.axes if mesh[axis] > 1]
    return [each for n in range(1, len(axes) + 1) for each in combinations(axes, n)]


def _line() -> str:
    """The line that has led here, of the nearest function of the program outside of this package.

    Counted from the function's first, so that other code may be edited before a step is replayed.
    """
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        # What torch generates when it compiles has no module, and is not there on every rank.
        if module and not module.startswith(("sharding.", "torch.", "contextlib")):
            return f"{frame.f_code.co_name}+{frame.f_lineno - frame.f_code.co_firstlineno}"
        frame = frame.f_back
    return ""  # a backward pass in a thread of autograd's own
