"""Results as a page: one table for each group, and what was run where and with what."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from peers.agreement import TOLERANCE, agreement
from peers.results import WARM_UP, Group, Run, cpu_of, groups, peak_of, ratios, speed_of, summary
from peers.systems import REFERENCE, SYSTEMS

MIB = 2**20
ALLOCATOR = {
    "default": "malloc as it is",
    "kept": "malloc keeps what is freed",
    "returned": "malloc returns what is freed",
}
HEAD = (
    "system",
    "CPU s per step, all ranks (range)",
    "of one process",
    "tokens/s",
    "peak MiB per rank",
    "above imports",
    "MiB sent per rank",
    "largest difference of a loss",
)

BEST = ("of the best peer, round by round", "CPU s", "tokens/s", "peak memory")

INTRODUCTION = """\
# Side by side

The same Qwen3-MoE model, weights, batches, AdamW and clipping, trained by each system in processes
of its own, in turn. CPU seconds are those of all processes together; other work on the machine
disturbs them less than wall time, and "of one process" compares what ran in the same round: the
median of the rounds, and their range. Memory is resident, of the largest rank. Bytes sent are those
that every exchange of the pieces must carry, counted where torch, or a `Comm`, starts them. Losses
are those of the first ten steps, and differ from those of one process by no more than a relative
{float32:.0e} in float32 and {bfloat16:.0e} in bfloat16, unless it says so: `near_ties.py` shows the
steps in which rounding decides where a token goes, in plain transformers alone.

The first {warm_up} steps of each run are not timed. Made by `make bench`
(`python examples/benchmarks/side_by_side.py`).
"""


def page(runs: Sequence[Run]) -> str:
    """The whole of it, in markdown."""
    tables = [table(group, systems) for group, systems in groups(runs).items()]
    return "\n".join([INTRODUCTION.format(**TOLERANCE, warm_up=WARM_UP), *tables, origin(runs)])


def table(group: Group, systems: Mapping[str, Sequence[Run]]) -> str:
    """A row for each system; below the table, the errors of those that failed."""
    reference = systems.get(REFERENCE, ())
    rows = [row(name, runs, reference) for name, runs in systems.items()]
    failed = [run for runs in systems.values() for run in runs if run.error]
    errors = [f"\n{run.system}, round {run.round}: `{run.error}`" for run in failed]
    sizes = {
        f"{run.parameters / 1e6:.0f} M parameters, {run.tokens} tokens per step, "
        for runs in systems.values()
        for run in runs
        if not run.error
    }
    title = f"## {group.shape}, {group.dtype}, sequences of {group.length}"
    said = "".join(sorted(sizes)) + ALLOCATOR[group.malloc]
    best = against_peers(systems)
    compared = ["", grid(BEST, best)] if best else []
    return "\n".join([title, "", said, "", grid(HEAD, rows), *compared, *errors, ""])


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def against_peers(systems: Mapping[str, Sequence[Run]]) -> list[tuple[str, ...]]:
    """A row for each of our systems; in each round another peer may be the best."""
    peers = [run for name, runs in systems.items() if SYSTEMS[name].is_peer for run in runs]
    rows: list[tuple[str, ...]] = []
    for name, runs in systems.items():
        cpu = ratios(runs, peers, cpu_of)
        if SYSTEMS[name].is_ours and cpu:
            speed, memory = ratios(runs, peers, speed_of, max), ratios(runs, peers, peak_of)
            rows.append((name, *map(spread, (cpu, speed, memory))))
    return rows


def row(name: str, runs: Sequence[Run], reference: Sequence[Run]) -> tuple[str, ...]:
    """The cells of a system, ``failed`` in each if none of its runs ended well."""
    found = summary(runs)
    if found is None:
        return name, "failed", *["-"] * (len(HEAD) - 2)
    low, high = found.cpu_range
    return (
        name,
        f"{found.cpu:.3f} ({low:.3f} to {high:.3f})",
        spread(ratios(runs, reference, cpu_of)),
        f"{found.tokens_per_second:.0f}",
        f"{found.peak / MIB:.0f}",
        f"{found.above_import / MIB:.0f}",
        f"{found.sent / MIB:.1f}",
        losses_of(runs, reference),
    )


def spread(values: Sequence[float]) -> str:
    """The median, and the range if there is one.

    >>> spread([0.9, 0.7, 0.8]), spread([0.9]), spread([])
    ('0.80 (0.70 to 0.90)', '0.90', '')
    """
    if not values:
        return ""
    middle, low, high = (f"{f(values):.2f}" for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def losses_of(runs: Sequence[Run], reference: Iterable[Run]) -> str:
    """The worst of the rounds against the reference."""
    expected = next((run.losses for run in reference if not run.error), None)
    if expected is None:
        return "no reference"
    good = [run for run in runs if not run.error]
    found = [agreement(run.losses, expected, run.group.dtype) for run in good]
    return str(max(found, key=lambda each: each.largest))


def origin(runs: Sequence[Run]) -> str:
    """Dates, machine and versions."""
    dates = sorted({run.date[:10] for run in runs})
    machines = sorted({f"{run.cores} cores of {run.processor}" for run in runs})
    versions = sorted({f"{k} {v}" for run in runs for k, v in run.versions.items()})
    days = " to ".join(sorted({dates[0], dates[-1]}))
    return f"{days}. {'; '.join(machines)}. {', '.join(versions)}.\n"
