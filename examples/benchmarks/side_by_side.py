"""The same training by functional-ep and by its peers, side by side; writes a page and a plot.

    python examples/benchmarks/side_by_side.py
    python examples/benchmarks/side_by_side.py --rounds 3 --systems 'FSDP2;functional-ep'

Systems take turns, round by round, each in processes of its own. Results are appended to a file,
and what is in it already is not run again: interrupt it and go on. Peers whose requirements
exclude others get virtual environments of their own, which the first run makes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from peers.agreement import COMPARED, TOLERANCE
from peers.environments import python_of
from peers.launch import MALLOC, launch
from peers.model import write_weights
from peers.plot import plot
from peers.rank import Request
from peers.results import WARM_UP, Group, Run, append, groups, read
from peers.shapes import SHAPES, Job
from peers.systems import SYSTEMS
from peers.table import page, table

FEWEST = WARM_UP + 3


class Options(NamedTuple):
    """How runs are made."""

    results: Path
    environments: Path
    ranks: int
    rounds: int
    steps: int | None
    budget: float
    limit: float


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    systems = [name for name in SYSTEMS if any(part in name for part in args.systems.split(";"))]
    if not systems:
        raise SystemExit(f"--systems {args.systems!r} is part of none of {', '.join(SYSTEMS)}")
    options = Options(
        *(args.results, args.environments, args.ranks),
        *(args.rounds, args.steps, args.budget, args.limit),
    )
    for group in wanted(args):
        compare(group, systems, options)
    write(options.results, args.page)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("--shapes", type=some_of(SHAPES), default="A,B,C,D", help=f"of {', '.join(SHAPES)}")
    add("--dtypes", type=some_of(TOLERANCE), default="float32", help=f"of {', '.join(TOLERANCE)}")
    add("--lengths", default="256", help="of sequences, such as 256,1024")
    add("--systems", default="", help="parts of names, such as 'FSDP2;AutoEP'; by default all")
    malloc = f"how glibc is told to behave: of {', '.join(MALLOC)}"
    add("--malloc", type=some_of(MALLOC), default="default", help=malloc)
    add("--rounds", type=int, default=2, help="runs of each system, in turn")
    add("--ranks", type=int, default=2)
    add("--steps", type=int, help="of each run; by default as many as fit in the budget")
    add("--budget", type=float, default=12, help="seconds to train in, in rounds after the first")
    add("--limit", type=float, default=400, help="seconds after which a run has failed")
    add("--results", type=Path, default=Path("runs/side_by_side.jsonl"))
    add("--environments", type=Path, default=Path(sys.prefix) / "peers")
    add("--page", type=Path, help="such as docs/benchmarks.md; a plot is put beside it")
    return made


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reads names between commas, each of which has to be known."""

    def read(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return text.split(",")

    return read


def wanted(args: argparse.Namespace) -> Iterator[Group]:
    for dtype in args.dtypes:
        for length in args.lengths.split(","):
            for shape in args.shapes:
                for malloc in args.malloc:
                    yield Group(shape, dtype, int(length), malloc)


def compare(group: Group, systems: Sequence[str], options: Options) -> None:
    """All rounds of all systems, and the table of them."""
    job = Job.of(group.shape, group.dtype, group.length, options.ranks)
    with tempfile.TemporaryDirectory(prefix="weights-") as directory:
        for number in range(options.rounds):
            for system in systems:
                one(system, number, job, group, Path(directory), options)
    print(table(group, groups(read(options.results))[group]), flush=True)


def one(system: str, number: int, job: Job, group: Group, weights: Path, options: Options) -> None:
    """One run, unless its result is there; its result, or why there is none, is appended."""
    before = {run.key: run for run in read(options.results) if not run.error}
    today = datetime.now().isoformat(timespec="seconds")
    run = Run(system, group, number, today, os.cpu_count() or 0, processor())
    if run.key in before:
        return
    print(f"{'-'.join(map(str, group))} round {number} {system}: ", end="", flush=True)
    start = time.perf_counter()
    try:
        python = python_of(SYSTEMS[system].environment, options.environments)
        if not any(weights.iterdir()):
            write_weights(job, weights)
        steps = options.steps or steps_within(options.budget, before.get((system, group, 0)))
        request = Request(system, job.to_json(), str(weights), steps)
        run = run.answered(
            launch(request, python, options.ranks, group.malloc, options.limit), job.tokens
        )
        print(f"{sorted(run.cpu)[len(run.cpu) // 2]:.3f} CPU s per step", end="")
    except RuntimeError as error:
        run = replace(run, error=str(error))
        print(f"FAILED: {error}", end="")
    print(f", {time.perf_counter() - start:.0f} s", flush=True)
    append(options.results, run)


def steps_within(budget: float, first: Run | None) -> int:
    """Ten to compare losses in the first round; then what the time allows."""
    if first is None:
        return COMPARED
    return max(FEWEST, min(20, int(budget / sorted(first.wall)[len(first.wall) // 2])))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "an unnamed processor")


def write(results: Path, target: Path | None) -> None:
    """The page and its plot, of all results that there are."""
    runs = read(results)
    if target is None or not runs:
        return
    target.write_text(page(runs))
    plot(
        runs,
        target.with_suffix(".png"),
        f"The same training, side by side, on {runs[0].cores} cores",
    )
    print(f"wrote {target} and {target.with_suffix('.png')}")


if __name__ == "__main__":
    main()
