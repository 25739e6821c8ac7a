"""A step's memory, foreseen by rehearsing it, beside what a few steps take on real ranks.

    python examples/benchmarks/plan_memory.py

Measured is the state, and by how much the largest rank's memory grew in training beyond its set-up,
with malloc told to return what is freed. That holds memory which the transport shares and kernels
use inside as well; left out are pages of the libraries' files, which the first step reads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers.launch import launch
from peers.model import BETAS, CLIP, DECAY, EPS, RATE, batch_of, config_of, write_weights
from peers.rank import Reply, Request
from peers.shapes import SHAPES, Job
from peers.systems.ours import RULES
from peers.trainer import dtype_of

from functional_ep import Precision, adamw, from_huggingface
from functional_ep.memory import StepMemory, step_memory
from sharding import Comm, Mesh, Plan, make_plan
from sharding.sharded import Backward

MODES: tuple[Backward, ...] = ("keep", "regather", "recompute")
STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="A,B,C,D")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    for name in args.shapes.split(","):
        sequences = 2 if args.length <= 256 else 1
        job = Job(SHAPES[name], args.dtype, args.length, sequences, args.ranks)
        with tempfile.TemporaryDirectory(prefix="weights-") as weights:
            write_weights(job, Path(weights))
            for backward in MODES:
                found = foreseen(job, backward)
                took = found.params + found.moments + grown(job, backward, weights)
                print(
                    f"{name} {args.dtype} {args.length} {backward:9} {found}; "
                    f"measured {took / 2**20:.1f} MiB: {found.peak / took:.2f}",
                    flush=True,
                )


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


def grown(job: Job, backward: Backward, weights: str) -> int:
    """By how much a rank's memory grows in training, at most."""
    request = Request(f"functional-ep, {backward}", job.to_json(), weights, STEPS)
    return growth(launch(request, Path(sys.executable), job.ranks, "returned", 600))


def growth(replies: Sequence[Reply]) -> int:
    """Of the largest rank; pages of libraries' files that the first step reads are not its own."""
    return max(reply.peak - reply.loaded - reply.ready for reply in replies)


if __name__ == "__main__":
    main()
