"""gather and reduce of a ZeRO-3 leaf against torch's own collectives, on real gloo ranks.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/benchmarks/collectives.py --mib 128
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 examples/benchmarks/collectives.py --mib 1

The four alternate; each is timed between two barriers, and torch's write into memory that exists.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from time import perf_counter

import torch
import torch.distributed as dist

from sharding import Mesh, distributed, zero3
from sharding.gather import Layout, gather, reduce


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=float, default=128, help="size of the gathered leaf")
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    mesh, entries = Mesh(edp=ranks), int(args.mib * 2**18) // ranks * ranks
    layout = Layout(zero3("edp"), mesh, (entries,), torch.float32)
    with distributed(mesh, device="cpu") as comm, torch.no_grad():
        shard, view = torch.ones(entries // ranks), torch.ones(entries)
        whole, part = torch.empty(entries), torch.empty(entries // ranks)
        candidates: dict[str, Callable[[], object]] = {
            "gather": lambda: gather([layout], [shard], comm),
            "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, shard),
            "reduce": lambda: reduce([layout], [view], comm),
            "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, view),
        }
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for run in range(args.runs + 3):
            for name, act in candidates.items():
                dist.barrier()
                start = perf_counter()
                act()
                dist.barrier()
                if run >= 3:
                    times[name].append((perf_counter() - start) * 1e3)
    if comm.rank == 0:
        print(
            f"{args.mib:g} MiB on {ranks} gloo ranks, {args.runs} runs, torch {torch.__version__}"
        )
        for name, ms in times.items():
            print(f"  {name:24} {statistics.median(ms):8.2f} ms ({min(ms):.2f} to {max(ms):.2f})")
        for ours, theirs in (
            ("gather", "all_gather_into_tensor"),
            ("reduce", "reduce_scatter_tensor"),
        ):
            ratios = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
            print(f"  {theirs} / {ours}: median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
