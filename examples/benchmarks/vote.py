"""CPU time of one train step of N real ranks, with and without a vote on it, alternating.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/benchmarks/vote.py [--copies]

The CPU time of all processes is added up, which other work on the machine disturbs less than wall
time. With --copies the dense leaves are whole on every rank, so that there are copies to compare.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from functional_ep import Vote, adamw, init_state, lm, make_train_step
from functional_ep.malloc import keep_freed_memory
from sharding import Comm, Mesh, distributed, expert_parallel, make_plan, replicated, zero3

Batch = dict[str, torch.Tensor]


def trainer(comm: Comm, batch: Batch, copies: bool, vote: Vote | None) -> Callable[[], float]:
    """A function that runs one step and returns its CPU seconds."""
    cfg, optimizer = lm.Config(), adamw(1e-3)
    rules = {
        "dense": replicated() if copies else zero3("edp", "ep"),
        "expert": expert_parallel("ep", store=("edp",)),
    }
    params = lm.init(cfg, seed=0)
    plan = make_plan(params, lm.labels, rules, comm.mesh)
    loss = lm.loss(cfg, plan, comm)
    step = make_train_step(loss, plan, optimizer, comm, clip=1.0, donate=True, commit=vote)
    state = [init_state(plan.shard(params, comm), plan, optimizer)]

    def run() -> float:
        start = time.process_time()
        state[0], _ = step(state[0], batch)
        return time.process_time() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each kind")
    parser.add_argument("--sequences", type=int, default=4, help="of each rank")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--copies", action="store_true", help="replicate the dense leaves")
    args = parser.parse_args()
    keep_freed_memory()
    random = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    shape = (args.sequences, args.length + 1)
    ids = torch.randint(0, lm.Config().vocab, shape, generator=random)
    batch = {"input_ids": ids[:, :-1].clone(), "labels": ids[:, 1:].clone()}
    with distributed(Mesh(edp=1, ep=int(os.environ.get("WORLD_SIZE", "1")))) as comm:
        kinds = {"without": None, "with": Vote()}
        runs = {kind: trainer(comm, batch, args.copies, vote) for kind, vote in kinds.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.steps + 2):
            for kind, run in runs.items():
                (total,) = comm.all_reduce([torch.tensor(run())], comm.mesh.axes)
                seconds[kind].append(float(total))
    if comm.rank == 0:
        medians = {kind: statistics.median(times[2:]) for kind, times in seconds.items()}
        for kind, median in medians.items():
            print(f"{kind} a vote: median {median * 1e3:.2f} ms CPU per step, all ranks")
        pairs = zip(seconds["with"][2:], seconds["without"][2:], strict=True)
        more = statistics.median(a - b for a, b in pairs)
        print(f"a vote costs {more * 1e3:.2f} ms, {more / medians['without']:.2%} of a step")


if __name__ == "__main__":
    main()
