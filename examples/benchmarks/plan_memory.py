"""A step's memory, foreseen by rehearsing it, beside what runs of ``side_by_side.py`` took.

    python examples/benchmarks/side_by_side.py --systems functional-ep --malloc returned
    python examples/benchmarks/plan_memory.py

Measured is the state, and by how much the largest rank's resident memory grew beyond its set-up.
That holds memory which the transport shares and kernels use inside as well; with malloc as it is,
also what it keeps of freed memory, which has been as much as a third.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peers.launch import MALLOC
from peers.model import BETAS, CLIP, DECAY, EPS, RATE, batch_of, config_of
from peers.results import Group, Run, groups, read
from peers.shapes import SHAPES, Job
from peers.systems.ours import RULES
from peers.trainer import dtype_of

from functional_ep import Precision, adamw, from_huggingface
from functional_ep.memory import StepMemory, step_memory
from sharding import Comm, Mesh, Plan, make_plan
from sharding.sharded import Backward

MODES: tuple[Backward, ...] = ("keep", "regather", "recompute")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="A,B,C,D")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--malloc", choices=list(MALLOC), default="returned")
    parser.add_argument("--results", type=Path, default=Path("runs/side_by_side.jsonl"))
    args = parser.parse_args()
    runs = read(args.results)
    for name in args.shapes.split(","):
        sequences = 2 if args.length <= 256 else 1
        job = Job(SHAPES[name], args.dtype, args.length, sequences, args.ranks)
        group = Group(name, args.dtype, args.length, args.malloc)
        for backward in MODES:
            found = foreseen(job, backward)
            print(f"{name} {args.dtype} {args.length} {backward:9} {found}", end="")
            grown = measured(runs, group, f"functional-ep, {backward}")
            if grown is not None:
                took = found.params + found.moments + grown
                print(f"; measured {took / 2**20:.1f} MiB: {found.peak / took:.2f}", end="")
            print(flush=True)


def foreseen(job: Job, backward: Backward) -> StepMemory:
    model = from_huggingface(config_of(job))
    precision = None
    if job.dtype != "float32":
        precision = Precision(compute=dtype_of(job), reduce=torch.float32)
    plan = make_plan(model.shapes, model.labels, RULES, Mesh(edp=1, ep=job.ranks), precision)

    def loss(plan: Plan, comm: Comm) -> Any:
        return model.loss(plan, comm, backward)

    ids, targets = batch_of(job, 0, 0)
    batch = {"input_ids": ids, "labels": targets}
    return step_memory(loss, plan, adamw(RATE, *BETAS, EPS, DECAY), batch, clip=CLIP)


def measured(runs: list[Run], wanted: Group, system: str) -> int | None:
    """By how much a rank's memory has grown in training, at most; none, if it was not run."""
    good = [run for run in groups(runs).get(wanted, {}).get(system, []) if not run.error]
    grown = [p - r for run in good for p, r in zip(run.peak, run.ready, strict=True)]
    return max(grown, default=None)


if __name__ == "__main__":
    main()
