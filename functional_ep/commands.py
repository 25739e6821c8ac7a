"""What the console command can do: each function refuses wrong arguments, then returns the act."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch

from sharding import Comm, Mesh, Plan, distributed, make_plan, simulate, zero3
from sharding.distributed import VARIABLES

from . import metrics
from .checkpoint import Contents, attached, committed, describe, restore, save, verify
from .job import prepare
from .malloc import keep_freed_memory
from .program import CannotStart
from .report import run
from .stopping import on_signals

Act = Callable[[], None]


def training(options: argparse.Namespace) -> Act:
    """``functional-ep train``: on the ranks of a launcher, on simulated ones, or on one."""
    launched = all(name in os.environ for name in VARIABLES)
    metrics.require_extras()
    job = prepare(options, int(os.environ["WORLD_SIZE"]) if launched else None)

    def act() -> None:
        keep_freed_memory()
        # A signal that comes before the ranks have met ends the process as ever.
        if launched:
            with distributed(job.mesh, device=job.device.type) as comm, on_signals() as wish:
                run(comm, job, wish)
        else:
            with on_signals() as wish:
                simulate(lambda comm: run(comm, job, wish), job.mesh, device=job.device)

    return act


def checking(options: argparse.Namespace) -> Act:
    """``functional-ep check``: exit status 1 if a byte is not what was written."""
    paths = committed(options.path)
    if not paths:
        describe(options.path)
        paths = [options.path]

    def act() -> None:
        problems = 0
        for path in paths:
            try:
                contents = verify(path)
            except (OSError, ValueError) as error:  # nothing of its manifest can be believed
                problems += 1
                print(f"PROBLEM: {error}")
                continue
            problems += len(contents.problems)
            print(contents)
        if problems:
            raise SystemExit(1)

    return act


def resharding(options: argparse.Namespace) -> Act:
    """``functional-ep reshard``: the same state in other files; each is verified as it is read."""
    if options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks}: give the number of files, at least 1")
    if committed(options.to) or options.to.exists():
        raise FileExistsError(f"{options.to} exists already: choose another path")
    contents = describe(options.path)

    def program(comm: Comm) -> None:
        plan = plan_of(contents, comm.mesh)
        state = restore(options.path, plan, comm)
        save(options.to, state, plan, comm, metadata=contents.metadata, files=_files_of(contents))

    def act() -> None:
        try:
            simulate(program, Mesh(edp=options.ranks))
        except (OSError, ValueError) as error:  # a damaged byte, a full disk
            raise CannotStart(error) from error
        print(describe(options.to))

    return act


def plan_of(contents: Contents, mesh: Mesh) -> Plan:
    """Every leaf cut into equal shares, under the label that it had."""
    shapes = {x.path: torch.empty(x.shape, dtype=x.dtype, device="meta") for x in contents.leaves}
    labels = {leaf.path: leaf.label for leaf in contents.leaves}
    frozen = {leaf.label for leaf in contents.leaves if leaf.frozen}
    rules = dict.fromkeys(labels.values(), zero3(*mesh.axes))
    return make_plan(shapes, labels, rules, mesh, frozen=frozen)


def _files_of(contents: Contents) -> dict[str, bytes]:
    return {name: attached(contents.path, name) for name in contents.files}
