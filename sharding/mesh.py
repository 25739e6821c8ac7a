"""Meshes: ranks arranged along named axes. Pure integers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

Axes = tuple[str, ...]


@dataclass(frozen=True, init=False)
class Mesh:
    """``rank = row-major index of its coordinates``: ranks arranged along named axes.

    ``Mesh(edp=2, ep=4)`` has 8 ranks; the last axis varies fastest. An *axis* belongs to a mesh, a
    *dim* to a tensor. A subset of axes names a *fiber* through each rank: the ranks that differ
    from it only along those axes. Collectives run over fibers.

    Raises:
        ValueError: an axis whose size is not a positive integer.

    >>> mesh = Mesh(edp=2, ep=4)
    >>> mesh.size, mesh.axes
    (8, ('edp', 'ep'))
    >>> mesh.coords(6)
    {'edp': 1, 'ep': 2}
    >>> mesh.fiber(6, ("ep",)), mesh.index(6, ("ep",))
    ((4, 5, 6, 7), 2)
    """

    sizes: tuple[tuple[str, int], ...]

    def __init__(self, **sizes: int) -> None:
        for axis, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"Mesh({axis}={size!r}): an axis has a positive number of ranks")
        object.__setattr__(self, "sizes", tuple(sizes.items()))

    @cached_property
    def axes(self) -> Axes:
        """The names of the axes, slowest first."""
        return tuple(axis for axis, _ in self.sizes)

    @cached_property
    def size(self) -> int:
        """The number of ranks."""
        return math.prod(size for _, size in self.sizes)

    def __getitem__(self, axis: str) -> int:
        """The number of ranks along one axis."""
        return dict(self.sizes)[self.check((axis,))[0]]

    def __iter__(self) -> Iterator[int]:
        """Every rank, in order."""
        return iter(range(self.size))

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{axis}={size}' for axis, size in self.sizes)})"

    def check(self, axes: object) -> Axes:
        """The axes themselves, if each is on the mesh and none is named twice.

        >>> Mesh(edp=2, ep=2).check(("tp",))
        Traceback (most recent call last):
          ...
        ValueError: axis 'tp' is not on Mesh(edp=2, ep=2): name axes among 'edp', 'ep'
        """
        if not isinstance(axes, tuple):
            raise TypeError(
                f"axes are a tuple of axis names such as {self.axes!r}, not {axes!r}"
                + (f": write ({axes!r},)" if isinstance(axes, str) else "")
            )
        for position, axis in enumerate(axes):
            if axis not in self.axes:
                known = ", ".join(map(repr, self.axes))
                fix = f"name axes among {known}" if known else f"one process is Mesh({axis}=1)"
                raise ValueError(f"axis {axis!r} is not on {self}: {fix}")
            if axis in axes[:position]:
                raise ValueError(f"axis {axis!r} is named twice in {axes!r}")
        return axes

    def count(self, axes: Axes) -> int:
        """The number of ranks in a fiber along ``axes``."""
        sizes = dict(self.sizes)
        return math.prod(sizes[axis] for axis in self.check(axes))

    def rest(self, axes: Axes) -> Axes:
        """The axes of the mesh that are not among ``axes``, slowest first."""
        self.check(axes)
        return tuple(axis for axis in self.axes if axis not in axes)

    def coords(self, rank: int) -> dict[str, int]:
        """``rank -> {axis: coordinate}``, the inverse of :meth:`rank`."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not on {self}: it has ranks 0 to {self.size - 1}")
        coords: dict[str, int] = {}
        for axis, size in reversed(self.sizes):
            rank, coords[axis] = divmod(rank, size)
        return {axis: coords[axis] for axis in self.axes}

    def rank(self, coords: Mapping[str, int]) -> int:
        """``{axis: coordinate} -> rank``, row-major.

        >>> Mesh(edp=2, ep=4).rank({"edp": 1, "ep": 2})
        6
        """
        rank = 0
        for axis, size in self.sizes:
            if not 0 <= coords.get(axis, -1) < size:
                raise ValueError(f"{dict(coords)} is not on {self}: a coordinate below each size")
            rank = rank * size + coords[axis]
        return rank

    def index(self, rank: int, axes: Axes) -> int:
        """The place of ``rank`` in its fiber: row-major over ``axes`` in the order given."""
        coords, sizes, place = self.coords(rank), dict(self.sizes), 0
        for axis in self.check(axes):
            place = place * sizes[axis] + coords[axis]
        return place

    def fiber(self, rank: int, axes: Axes) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` only along ``axes``, ordered by :meth:`index`."""
        coords, sizes = self.coords(rank), dict(self.sizes)
        points = [coords]
        for axis in self.check(axes):
            points = [point | {axis: i} for point in points for i in range(sizes[axis])]
        return tuple(map(self.rank, points))
