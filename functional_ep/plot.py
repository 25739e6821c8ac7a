"""One picture of a run: loss beside its baselines, learning rate, gradient norm, expert load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .metrics import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#22272e", "#6b7280", "#e5e7eb"
TRAIN, VALID = "#3f74b5", "#d5562b"

RAW: dict[str, Any] = {"alpha": 0.25, "linewidth": 0.8}
BOLD: dict[str, Any] = {"linewidth": 1.8}
BITS = (0.5, 1, 1.5, 2, 3, 4, 6, 8)

BASELINES = {"unigram": "unigram", "xz": "xz -9e"}

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.xmargin": 0,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}


def plot(records: Sequence[Record], path: str | Path, *, title: str = "") -> None:
    """Draw the records of one run as a PNG.

    Records are those of `metrics.read`; those of an evaluation hold ``valid_bits_per_byte`` and the
    baselines ``unigram`` and ``xz`` as well.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError(f"nothing to plot in {path}: there are no records; train a step first")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(12, 8.4), dpi=150, layout=layout)
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=MUTED)
        grid = figure.add_gridspec(4, 2, width_ratios=(2, 1), height_ratios=(1, 1, 1, 1))
        _loss(figure.add_subplot(grid[:2, 0]), records)
        _learning_rate(figure.add_subplot(grid[0, 1]), records)
        _gradient_norm(figure.add_subplot(grid[1, 1]), records)
        _expert_load(figure, figure.add_subplot(grid[2:, :]), records)
        for axes in figure.axes[:4]:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.savefig(path)


def _loss(axes: Axes, records: Sequence[Record]) -> None:
    steps, train = _positive(records, "bits_per_byte")
    axes.plot(steps, train, color=TRAIN, **RAW)
    axes.plot(steps, _smooth(train), color=TRAIN, **BOLD, label="training (smoothed)")
    evaluated, valid = _positive(records, "valid_bits_per_byte")
    if valid:
        look: dict[str, Any] = {"color": VALID, "markersize": 4, "clip_on": False, **BOLD}
        axes.plot(evaluated, valid, "o-", label="validation", **look)
    ends = [(height, "validation", VALID) for height in valid[-1:]]
    for name, words in BASELINES.items():
        for height in _positive(records, name)[1][-1:]:
            axes.axhline(height, color=INK, linewidth=1, linestyle=(0, (5, 4)))
            ends.append((height, words, INK))
    heights = [*train, *valid, *(height for height, _, _ in ends)]
    finite = list(filter(math.isfinite, heights)) or [1, 8]
    axes.set_yscale("log", base=2)
    axes.minorticks_off()
    axes.set_yticks(BITS, [f"{bits:g}" for bits in BITS])
    axes.set_ylim(0.9 * min(finite), 1.05 * max(finite))
    axes.set(title="Loss, bits per byte", xlabel="step")
    axes.legend(frameon=False, loc="upper right", labelcolor=MUTED)
    _name_ends(axes, [end for end in ends if math.isfinite(end[0])])


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Heights and words in the right margin, the higher ones moved up where they would overlap."""
    low, high = map(math.log, axes.get_ylim())
    place = -math.inf
    for height, words, color in sorted(ends):
        place = max((math.log(height) - low) / (high - low), place + 0.05)
        axes.annotate(
            f"{height:.2f} {words}",
            xy=(1, place),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=color,
        )


def _learning_rate(axes: Axes, records: Sequence[Record]) -> None:
    axes.plot(*_series(records, "lr"), color=TRAIN, **BOLD)
    axes.set(title="Learning rate", ylim=(0, None))


def _gradient_norm(axes: Axes, records: Sequence[Record]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    steps, norms = _positive(records, "grad_norm")
    axes.plot(steps, norms, color=TRAIN, **RAW)
    axes.plot(steps, _smooth(norms), color=TRAIN, **BOLD)
    axes.set(title="Gradient norm, before clipping", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()


def _expert_load(figure: Figure, axes: Axes, records: Sequence[Record]) -> None:
    """A heat map: one row per expert of each layer, coloured by its tokens over an even share."""
    from matplotlib.colors import LogNorm

    steps = [entry["step"] for entry in records]
    load = _binned(torch.tensor([entry["tokens_per_expert"] for entry in records]).double())
    layers, experts = load.shape[1:]
    even = load / load.mean(dim=2, keepdim=True).clamp(min=1e-12)
    image = axes.imshow(
        even.flatten(1).T.clamp(1 / 4, 4).numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        norm=LogNorm(1 / 4, 4),
        extent=(steps[0] - 0.5, steps[-1] + 0.5, layers, 0),
    )
    for layer in range(1, layers):
        axes.axhline(layer, color="white", linewidth=3)
    axes.set_yticks([layer + 0.5 for layer in range(layers)], [f"layer {n}" for n in range(layers)])
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(title=f"Tokens per expert, {experts} experts in each layer", xlabel="step")
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=28)
    bar.set_ticks([1 / 4, 1 / 2, 1, 2, 4], labels=["≤ ¼", "½", "even", "2 x", "≥ 4 x"])
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()


def _series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """The steps that have ``key``, and its values; null, where it was not finite, leaves a gap."""
    found = [(entry["step"], entry[key]) for entry in records if key in entry]
    return [step for step, _ in found], [math.nan if x is None else x for _, x in found]


def _positive(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """A series for a logarithmic axis: 0, the entropy of one byte repeated, has no place there."""
    steps, values = _series(records, key)
    return steps, [x if x > 0 else math.nan for x in values]


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over about 4 % of the curve around each step, over less of it near its ends."""
    known = torch.tensor(values, dtype=torch.float64)
    sums = torch.stack([known.nan_to_num(), known.isfinite().double()]).cumsum(dim=1)
    sums = torch.nn.functional.pad(sums, (1, 0))
    place = torch.arange(len(values))
    before = place.clamp(max=len(values) // 50)
    after = torch.minimum(before, place.flip(0))
    total, count = sums[:, place + after + 1] - sums[:, place - before]
    return (total / count).tolist()


def _binned(load: Tensor, most: int = 240) -> Tensor:
    """Sums over runs of equally many steps, so that no more than ``most`` columns are drawn."""
    width = -(-len(load) // most)
    return torch.stack([part.sum(dim=0) for part in load.split(width)])
