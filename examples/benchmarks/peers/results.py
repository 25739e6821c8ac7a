"""Results: one line of JSON for each run, of all its processes together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from peers.rank import Reply

WARM_UP = 2  # steps that are not timed


class Group(NamedTuple):
    """What is compared: runs that differ in their system and round alone."""

    shape: str
    dtype: str
    length: int
    malloc: str


@dataclass(frozen=True)
class Run:
    """One run of one system; of those that failed ``error`` says why, and lists are empty.

    Lists of steps: ``losses``, and ``cpu`` and ``wall`` in seconds, the former summed over
    processes. Lists of processes, in bytes: ``imported``, ``ready``, ``peak`` and ``sent``.
    """

    system: str
    group: Group
    round: int
    date: str
    cores: int
    processor: str
    tokens: int = 0
    parameters: int = 0
    losses: Sequence[float] = ()
    cpu: Sequence[float] = ()
    wall: Sequence[float] = ()
    imported: Sequence[int] = ()
    ready: Sequence[int] = ()
    peak: Sequence[int] = ()
    sent: Sequence[int] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return self.system, self.group, self.round

    def answered(self, replies: Sequence[Reply], tokens: int) -> Run:
        """The same run with what its processes have measured."""
        first = replies[0]
        return replace(
            self,
            tokens=tokens,
            parameters=first.parameters,
            losses=first.losses,
            cpu=[sum(step) for step in zip(*(r.cpu for r in replies), strict=True)],
            wall=first.wall,
            versions=first.versions,
            imported=[r.imported for r in replies],
            ready=[r.ready for r in replies],
            peak=[r.peak for r in replies],
            sent=[r.sent for r in replies],
        )


class Summary(NamedTuple):
    """All rounds of a system in one group: medians, ranges, and the worst process's memory."""

    cpu: float
    cpu_range: tuple[float, float]
    tokens_per_second: float
    peak: int
    above_import: int
    sent: int


def summary(runs: Sequence[Run]) -> Summary | None:
    """Of the runs that did not fail; none, if all failed."""
    good = [run for run in runs if not run.error]
    if not good:
        return None
    cpu = [seconds for run in good for seconds in run.cpu[WARM_UP:]]
    wall = [seconds for run in good for seconds in run.wall[WARM_UP:]]
    return Summary(
        statistics.median(cpu),
        (min(cpu), max(cpu)),
        good[0].tokens / statistics.median(wall),
        max(max(run.peak) for run in good),
        max(p - i for run in good for p, i in zip(run.peak, run.imported, strict=True)),
        max(max(run.sent) for run in good),
    )


def cpu_of(run: Run) -> float:
    """Seconds of a step, over all processes; the median."""
    return statistics.median(run.cpu[WARM_UP:])


def speed_of(run: Run) -> float:
    """Tokens per second, by the median step."""
    return run.tokens / statistics.median(run.wall[WARM_UP:])


def peak_of(run: Run) -> float:
    """Bytes that the largest process had."""
    return max(run.peak)


def ratios(
    runs: Iterable[Run],
    others: Iterable[Run],
    value: Callable[[Run], float],
    best: Callable[[list[float]], float] = min,
) -> list[float]:
    """The value of a run over the best that ``others`` have in the same round, for each round.

    Rounds may lie days apart, and be of another machine: what ran in turn is compared.
    """
    found: dict[int, list[float]] = {}
    for run in others:
        if not run.error:
            found.setdefault(run.round, []).append(value(run))
    return [
        value(run) / best(found[run.round]) for run in runs if run.round in found and not run.error
    ]


def append(path: Path, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(run)) + "\n")


def read(path: Path) -> list[Run]:
    """All runs; of one that was made again, the last."""
    lines = path.read_text().splitlines() if path.exists() else []
    values = map(json.loads, lines)
    runs = [Run(**value | {"group": Group(*value["group"])}) for value in values]
    return list({run.key: run for run in runs}.values())


def groups(runs: Iterable[Run]) -> dict[Group, dict[str, list[Run]]]:
    """``{group: {system: its rounds}}`` in the order in which they were run."""
    found: dict[Group, dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.group, {}).setdefault(run.system, []).append(run)
    return found
