"""A table of bytes per rank and label: kept between steps, gathered, and sent in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .gather import Layout

HEAD = ("label", "leaves", "entries", "rule", "stored", "view", "sent/step")


def footprint(by_label: Mapping[str, Sequence[Layout]]) -> str:
    """A row for each label.

    *stored* is the parameters alone, without moments. *sent* counts a forward and a backward pass:
    two gathers (``regather``) and one reduction (none if frozen), each to the other ranks of the
    fiber.

    >>> import torch
    >>> from .rule import zero3
    >>> from .mesh import Mesh
    >>> print(footprint({"dense": [Layout(zero3("edp"), Mesh(edp=2), (4, 2), torch.float32)]}))
    label  leaves  entries  rule                          stored  view  sent/step
    dense  1       8        compute=- store=edp copies=-  16 B    32 B  48 B
    """
    rows = [HEAD, *(_row(label, layouts) for label, layouts in by_label.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _row(label: str, layouts: Sequence[Layout]) -> tuple[str, ...]:
    rule, mesh = layouts[0].rule, layouts[0].mesh
    roles = {"compute": rule.compute, "store": rule.store, "copies": rule.copies(mesh)}
    return (
        label,
        str(len(layouts)),
        f"{sum(math.prod(w.shape) for w in layouts):,}",
        " ".join(f"{role}={','.join(axes) or '-'}" for role, axes in roles.items()),
        _bytes(sum(w.shard_size * w.dtype.itemsize for w in layouts)),
        _bytes(sum(w.view_size * w.compute_dtype.itemsize for w in layouts)),
        _bytes(sum(map(_sent, layouts))),
    )


def _sent(w: Layout) -> int:
    ranks, copies = w.mesh.count(w.rule.store), w.mesh.count(w.rule.copies(w.mesh))
    gathers = 2 * (ranks - 1) * w.shard_size * w.compute_dtype.itemsize
    scatter = (ranks - 1) * w.shard_size * w.reduce_dtype.itemsize
    if w.frozen:
        return gathers
    return gathers + scatter + 2 * (copies - 1) * w.shard_size * w.reduce_dtype.itemsize // copies


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"
