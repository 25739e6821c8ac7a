"""One process of one run: ``python -m peers.rank REQUEST.json RESULT.json``."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from peers.measure import Clock, die_first, resident, restart_peak
from peers.shapes import Job
from peers.systems import SYSTEMS
from peers.trainer import Start

PACKAGES = ("torch", "transformers", "torchtitan", "deepspeed")


class Request(NamedTuple):
    """What a process is asked to do."""

    system: str
    job: Mapping[str, Any]
    weights: str
    steps: int


class Reply(NamedTuple):
    """What it has measured, of itself; bytes, and seconds of each step.

    ``loaded`` is by how much pages of files have grown in training: code that it is the first to
    run, and nothing that a step has allocated.
    """

    losses: list[float]
    cpu: list[float]
    wall: list[float]
    imported: int
    ready: int
    peak: int
    loaded: int
    sent: int
    parameters: int
    versions: dict[str, str]


def run(request: Request, answer: Path) -> None:
    """Train, then count the bytes of one step more; answer before anything is taken down."""
    die_first()
    system = SYSTEMS[request.system]
    start: Start = importlib.import_module(f"peers.systems.{system.module}").start
    imported = resident()
    job = Job.from_json(dict(request.job))
    with start(job, Path(request.weights), **system.options) as trainer:
        restart_peak()
        ready, files, clock = resident(), resident("RssFile"), Clock()
        losses: list[float] = []
        times: list[tuple[float, float]] = []
        for i in range(request.steps):
            losses.append(trainer.step(i))
            times.append(clock.look())
        peak, loaded = resident("VmHWM"), resident("RssFile") - files
        with trainer.traffic() as traffic:
            trainer.step(request.steps)
        cpu, wall = map(list, zip(*times, strict=True))
        reply = Reply(
            losses,
            cpu,
            wall,
            imported,
            ready,
            peak,
            loaded,
            traffic.sent,
            trainer.parameters,
            _versions(),
        )
        unfinished = answer.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(reply._asdict()))
        unfinished.rename(answer)


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    run(Request(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
