"""Bars for each system: CPU time, tokens per second and memory, one row of panels for a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from functional_ep.plot import INK, MUTED, STYLE, TRAIN, VALID
from peers.results import Group, Run, Summary, groups, summary
from peers.systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS: Mapping[str, Callable[[Summary], float]] = {
    "CPU seconds per step, all ranks": lambda s: s.cpu,
    "Tokens per second": lambda s: s.tokens_per_second,
    "Peak memory of a rank, GiB": lambda s: s.peak / 2**30,
}


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draw all groups as a PNG.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError(f"nothing to plot in {path}: there are no runs")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    grouped = groups(runs)
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(13, 0.7 + 2.7 * len(grouped)), dpi=130, layout=layout)
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=MUTED)
        panels = figure.subplots(len(grouped), len(PANELS), squeeze=False, sharey="row")
        for row, (group, systems) in zip(panels, grouped.items(), strict=True):
            for axes, (what, value) in zip(row, PANELS.items(), strict=True):
                _bars(axes, systems, value)
                axes.set_title(what)
            row[0].set_ylabel(_name(group), color=INK)
        figure.savefig(path)


def _bars(
    axes: Axes, systems: Mapping[str, Sequence[Run]], value: Callable[[Summary], float]
) -> None:
    for place, (name, runs) in enumerate(systems.items()):
        found = summary(runs)
        if found is None:
            axes.annotate(" failed", (0, place), va="center", color=MUTED)
            continue
        length = value(found)
        axes.barh(place, length, height=0.7, color=VALID if SYSTEMS[name].is_ours else TRAIN)
        axes.annotate(f" {length:.4g}", (length, place), va="center", color=MUTED, fontsize=8)
    axes.set_yticks(range(len(systems)), list(systems))
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
    axes.grid(False, axis="y")


def _name(group: Group) -> str:
    return f"{group.shape}, {group.dtype}, {group.length}"
