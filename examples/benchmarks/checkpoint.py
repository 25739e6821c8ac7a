"""Saving and restoring a state, against safetensors and torch.distributed.checkpoint.

    OMP_NUM_THREADS=1 python examples/benchmarks/checkpoint.py --mib 768 --directory /dev/shm

All write and read the same tensors, alternately. Ours take digests of what they write and compare
those of what they read. In memory, /dev/shm, syncing costs nothing, so that the work is compared;
on a disk, the candidates with "sync" wait for it. safetensors maps a file, and reads what is
touched: copied, its tensors are as good as ours. A stall is what a step waits for a save that is
written behind it; it is compared with copying the same state to memory that exists.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from functional_ep import Checkpoints, State, adamw, init_state, restore, save
from functional_ep.checkpoint.disk import Disk
from sharding import Comm, Mesh, Plan, make_plan, simulate, zero3

LEAVES = 24
Acts = dict[str, Callable[[], object]]


class Unsynced(Disk):
    """Nothing waits for the medium."""

    def sync(self, file: int) -> None: ...
    def sync_directory(self, path: Path) -> None: ...


def make_state(comm: Comm, mib: float) -> tuple[Plan, State, dict[str, Tensor]]:
    """A third each of parameters and two moments; and all of them by name."""
    entries = int(mib * 2**18 / 3) // LEAVES
    params = {f"w{i}": torch.randn(entries) for i in range(LEAVES)}
    plan = make_plan(params, dict.fromkeys(params, "x"), {"x": zero3("edp")}, comm.mesh)
    state = init_state(plan.shard(params, comm), plan, adamw(1e-3))
    for moment in state.opt["x"].values():
        for x in moment.values():
            x.copy_(torch.randn(entries))
    named = {f"params/{path}": x for path, x in state.params.items()}
    for name, moment in state.opt["x"].items():
        named |= {f"{name}/{path}": x for path, x in moment.items()}
    return plan, state, named


def candidates(comm: Comm, root: Path, mib: float) -> tuple[Acts, Acts, Callable[[], object]]:
    """What saves, what restores, and what clears the place for the next save."""
    plan, state, named = make_state(comm, mib)
    file, unsynced = root / "file.safetensors", Unsynced()
    into = {name: torch.empty_like(x) for name, x in named.items()}

    def synced() -> None:
        save_file(named, file)
        with open(file, "rb+") as handle:
            os.fsync(handle)

    saves: Acts = {
        "save": lambda: save(root / "ours", state, plan, comm),
        "save, no sync": lambda: save(root / "unsynced", state, plan, comm, disk=unsynced),
        "safetensors": lambda: save_file(named, file),
        "safetensors + sync": synced,
        "dcp": lambda: dcp.save(named, checkpoint_id=root / "dcp", no_dist=True),
    }
    restores: Acts = {
        "restore": lambda: restore(root / "ours", plan, comm),
        "restore, no digests": lambda: restore(root / "ours", plan, comm, verify=False),
        "safetensors": lambda: load_file(file),
        "safetensors, copied": lambda: [x.clone() for x in load_file(file).values()],
        "dcp": lambda: dcp.load(into, checkpoint_id=root / "dcp", no_dist=True),
    }

    def clear() -> None:
        for name in ("ours", "unsynced", "dcp"):
            shutil.rmtree(root / name, ignore_errors=True)
        file.unlink(missing_ok=True)

    return saves, restores, clear


def alternate(acts: Acts, runs: int, before: Callable[[], object]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in acts}
    for run in range(runs + 1):
        before()
        for name, act in acts.items():
            start = perf_counter()
            act()
            if run:
                times[name].append(perf_counter() - start)
    return times


def report(times: dict[str, list[float]], gigabytes: float, reference: str) -> None:
    for name, seconds in times.items():
        ratios = [b / a for a, b in zip(seconds, times[reference], strict=True)]
        rates = sorted(gigabytes / s for s in seconds)
        print(
            f"  {name:22}{statistics.median(rates):6.2f} GB/s ({rates[0]:.2f} to {rates[-1]:.2f}), "
            f"{statistics.median(ratios):.2f} x {reference}"
        )


def stalls(comm: Comm, root: Path, mib: float, runs: int) -> None:
    plan, state, named = make_state(comm, mib)
    memory = {name: torch.zeros_like(x) for name, x in named.items()}
    stalled: list[float] = []
    copied: list[float] = []
    with Checkpoints(root / "stalls", plan, comm, keep=1) as checkpoints:
        for run in range(runs + 1):
            start = perf_counter()
            for name, x in named.items():
                memory[name].copy_(x)
            middle = perf_counter()
            checkpoints.save(state._replace(step=torch.tensor(run + 1)))
            end = perf_counter()
            checkpoints.wait()
            if run:
                copied.append((middle - start) * 1e3)
                stalled.append((end - middle) * 1e3)
    for name, ms in (("stall", stalled), ("copy", copied)):
        print(f"  {name:22}{statistics.median(ms):6.0f} ms ({min(ms):.0f} to {max(ms):.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=float, default=384, help="parameters and moments together")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=None, help="where to write")
    args = parser.parse_args()

    def program(comm: Comm) -> Any:
        with TemporaryDirectory(dir=args.directory) as folder:
            root = Path(folder)
            saves, restores, clear = candidates(comm, root, args.mib)
            gigabytes = args.mib * 2**20 / 1e9
            print(
                f"{args.mib:g} MiB in {3 * LEAVES} tensors, one rank, {args.runs} runs, in "
                f"{root.parent}, torch {torch.__version__}, {torch.get_num_threads()} threads"
            )
            print("saving")
            report(alternate(saves, args.runs, clear), gigabytes, "safetensors")
            print("restoring")
            report(alternate(restores, args.runs, lambda: None), gigabytes, "safetensors, copied")
            clear()
            print("written behind training")
            stalls(comm, root, args.mib, args.runs)

    simulate(program, Mesh(edp=1))


if __name__ == "__main__":
    main()
