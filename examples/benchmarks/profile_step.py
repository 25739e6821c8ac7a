"""Where the time of a step goes: a trace for each rank, and a table by category.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/benchmarks/profile_step.py --shape B

Traces are for chrome://tracing or perfetto. Profiling itself takes time, of every operator alike:
compare shares, and take totals from ``side_by_side.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from breakdown import (
    CATEGORIES,
    MODEL,
    STEP,
    Transfers,
    breakdown,
    events_of,
    in_range,
    mark,
    table,
    with_range,
)
from peers.model import BETAS, CLIP, DECAY, EPS, RATE, batch_of, config_of
from peers.shapes import SHAPES, Job
from peers.systems.ours import RULES
from peers.trainer import dtype_of
from torch.distributed import get_world_size, init_process_group
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Qwen3MoeForCausalLM

from functional_ep import Precision, adamw, from_huggingface, init_state, make_train_step
from functional_ep.malloc import keep_freed_memory
from sharding import Comm, Mesh, distributed, make_plan
from sharding.sharded import Backward


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="B")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--length", type=int, default=256, help="of each of two sequences")
    parser.add_argument("--backward", choices=["keep", "regather", "recompute"], default="regather")
    parser.add_argument("--steps", type=int, default=4, help="that are profiled, after two others")
    parser.add_argument("--traces", type=Path, default=Path("runs/profile"))
    args = parser.parse_args()
    keep_freed_memory()
    init_process_group("gloo")
    job = Job(SHAPES[args.shape], args.dtype, args.length, ranks=get_world_size())
    with distributed(Mesh(edp=1, ep=job.ranks), device="cpu") as comm:
        run = trainer(job, Transfers(comm), args.backward)
        for i in range(2):
            run(i)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            for i in range(args.steps):
                with record_function(STEP):
                    run(2 + i)
        args.traces.mkdir(parents=True, exist_ok=True)
        trace = args.traces / f"{args.shape}-{args.dtype}-{args.backward}-rank{comm.rank}.json"
        seen.export_chrome_trace(str(trace))
        mine = breakdown(events_of(seen))
        row = torch.tensor(
            [mine.get(name, 0.0) / args.steps for name in CATEGORIES], dtype=torch.float64
        )
        (rows,) = comm.all_gather([row[None]], comm.mesh.axes)
    if comm.rank == 0:
        print(f"{args}, {job.tokens} tokens, torch {torch.__version__}; wall time of one step")
        print(table([dict(zip(CATEGORIES, row, strict=True)) for row in rows.tolist()]))
        print(f"traces are in {args.traces}")


def trainer(job: Job, comm: Comm, backward: Backward) -> Callable[[int], None]:
    """A function that trains on the i-th batch, in ranges."""
    torch.manual_seed(0)
    model = from_huggingface(Qwen3MoeForCausalLM(config_of(job)))
    precision = None
    if job.dtype != "float32":
        precision = Precision(compute=dtype_of(job), reduce=torch.float32)
    plan = make_plan(model.shapes, model.labels, RULES, comm.mesh, precision)
    optimizer = with_range(adamw(RATE, *BETAS, EPS, DECAY))
    loss: Any = model.loss(plan, comm, backward)
    mark(loss.replica.model)
    named = in_range(MODEL, loss)
    step = make_train_step(named, plan, optimizer, comm, clip=CLIP, donate=True)
    state = [init_state(model.load(plan, comm), plan, optimizer)]

    def run(i: int) -> None:
        ids, targets = batch_of(job, i, comm.rank)
        state[0], _ = step(state[0], {"input_ids": ids, "labels": targets})

    return run


if __name__ == "__main__":
    main()
