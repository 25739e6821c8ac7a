"""CPU time of one train step: N real ranks together against one process, same model and batch.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/benchmarks/train_step.py

Rank 0 times the whole batch alone while the others sleep, then all ranks time their shares; the
two alternate, and CPU time of all processes is compared, which other work on the machine disturbs
less than wall time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

from functional_ep import adamw, cosine, init_state, lm, make_train_step
from functional_ep.malloc import keep_freed_memory
from sharding import Comm, Mesh, distributed, expert_parallel, make_plan, simulate, zero3

RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


def trainer(cfg: lm.Config, comm: Comm, batches: list[dict[str, torch.Tensor]]):
    """A function that runs one step on the next batch and returns its CPU seconds."""
    params = lm.init(cfg, seed=0)
    plan = make_plan(params, lm.labels, RULES, comm.mesh)
    optimizer = adamw(cosine(1e-3, warmup=10, total=1000))
    step = make_train_step(lm.loss(cfg, plan, comm), plan, optimizer, comm, clip=1.0, donate=True)
    state = [init_state(plan.shard(params, comm), plan, optimizer)]

    def run(i: int) -> float:
        start = time.process_time()
        state[0], _ = step(state[0], batches[i % len(batches)])
        return time.process_time() - start

    return run


def make_batches(cfg: lm.Config, sequences: int, length: int) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, cfg.vocab, (4, sequences, length + 1), generator=random)
    return [dict(input_ids=x[:, :-1].clone(), labels=x[:, 1:].clone()) for x in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each kind")
    parser.add_argument("--sequences", type=int, default=8, help="in the whole batch")
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    keep_freed_memory()  # as `functional-ep train` does
    cfg, world = lm.Config(), int(os.environ.get("WORLD_SIZE", "1"))
    batches = make_batches(cfg, args.sequences, args.length)
    with distributed(Mesh(edp=1, ep=world)) as comm:
        n, r = args.sequences, comm.rank
        rows = slice(n * r // world, n * (r + 1) // world)
        mine = [{k: x[rows] for k, x in b.items()} for b in batches]
        together = trainer(cfg, comm, mine)
        alone = simulate(lambda one: trainer(cfg, one, batches), Mesh(edp=1, ep=1))[0]
        single: list[float] = []
        joint: list[float] = []
        for i in range(args.steps + 2):
            if r == 0:
                single.append(alone(i))
            comm.all_reduce([torch.zeros(1)], comm.mesh.axes)  # the others sleep meanwhile
            (total,) = comm.all_reduce([torch.tensor(together(i))], comm.mesh.axes)
            joint.append(float(total))
    if r == 0:
        one, many = sorted(single[2:]), sorted(joint[2:])
        for name, times in (("one process", one), (f"{world} ranks together", many)):
            print(
                f"{name}: median {statistics.median(times) * 1e3:.1f} ms CPU per step "
                f"(min {times[0] * 1e3:.1f}, max {times[-1] * 1e3:.1f}, {len(times)} steps)"
            )
        print(f"ratio of medians: {statistics.median(many) / statistics.median(one):.3f}")
        print(f"torch {torch.__version__}, {args.sequences} x {args.length} tokens, {cfg}")


if __name__ == "__main__":
    main()
