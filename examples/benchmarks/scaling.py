"""How the cost of a step grows with ranks, experts and tokens: three plots, and the numbers.

    python examples/benchmarks/scaling.py --plot docs/scaling.png

CPU seconds of all processes together, which say what more ranks cost on however many cores there
are. One shape is varied in one respect at a time; the batch is the same for any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from peers.launch import launch
from peers.model import write_weights
from peers.rank import Request
from peers.results import WARM_UP
from peers.shapes import SHAPES, Job
from peers.systems import REFERENCE

from functional_ep.plot import INK, MUTED, STYLE, TRAIN, VALID

SEQUENCES, LENGTH = 4, 256
RANKS, EXPERTS = (1, 2, 4), (8, 16, 32, 64, 128, 256)
LENGTHS = (32, 64, 128, 256, 512, 1024)
SYSTEMS: Mapping[str, str] = {
    REFERENCE: INK,
    "functional-ep, keep": TRAIN,
    "functional-ep, regather": VALID,
}


class Point(NamedTuple):
    """Median, least and most CPU seconds of a step."""

    varied: str
    value: int
    system: str
    cpu: float
    least: float
    most: float


def jobs(shape: str) -> Iterator[tuple[str, int, Job]]:
    """What is varied, to what, and the training that results."""
    base = SHAPES[shape]
    for ranks in RANKS:
        yield "ranks", ranks, Job(base, length=LENGTH, sequences=SEQUENCES // ranks, ranks=ranks)
    for experts in EXPERTS:
        more = replace(base, experts=experts)
        yield "experts", experts, Job(more, length=LENGTH, sequences=SEQUENCES // 2)
    for length in LENGTHS:
        job = Job(base, length=length, sequences=SEQUENCES // 2)
        yield "tokens", job.tokens, job


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="A")
    parser.add_argument("--varied", default="ranks,experts,tokens")
    parser.add_argument("--steps", type=int, default=10, help=f"of which {WARM_UP} are not timed")
    parser.add_argument("--results", type=Path, default=Path("runs/scaling.jsonl"))
    parser.add_argument("--plot", type=Path, help="a PNG to draw")
    args = parser.parse_args()
    points: list[Point] = []
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("w") as file:
        for varied, value, job in jobs(args.shape):
            for point in measured(varied, value, job, args.steps) if varied in args.varied else ():
                points.append(point)
                print(f"{varied} {value:5} {point.system}: {point.cpu:.3f} CPU s", flush=True)
                file.write(json.dumps(point._asdict()) + "\n")
    if args.plot is not None:
        plot(points, args.plot)


def measured(varied: str, value: int, job: Job, steps: int) -> Iterator[Point]:
    with tempfile.TemporaryDirectory(prefix="weights-") as weights:
        write_weights(job, Path(weights))
        for system in SYSTEMS:
            request = Request(system, job.to_json(), weights, steps)
            replies = launch(request, Path(sys.executable), job.ranks, "default", 600)
            columns = zip(*(reply.cpu for reply in replies), strict=True)
            cpu = [sum(step) for step in columns][WARM_UP:]
            yield Point(varied, value, system, statistics.median(cpu), min(cpu), max(cpu))


def plot(points: Sequence[Point], path: Path) -> None:
    """A panel for each respect, both axes in powers of two."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import StrMethodFormatter

    varied = list(dict.fromkeys(point.varied for point in points))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.12))
        panels = figure.subplots(1, len(varied), squeeze=False)[0]
        for axes, name in zip(panels, varied, strict=True):
            for system, color in SYSTEMS.items():
                mine = [p for p in points if (p.varied, p.system) == (name, system)]
                values = [p.value for p in mine]
                axes.plot(values, [p.cpu for p in mine], "o-", color=color, label=system)
                least, most = [p.least for p in mine], [p.most for p in mine]
                axes.fill_between(values, least, most, color=color, alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
            axes.set(title=f"CPU seconds per step by {name}", xlabel=name)
        figure.axes[0].legend(frameon=False, labelcolor=MUTED)
        figure.savefig(path)


if __name__ == "__main__":
    main()
