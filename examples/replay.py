"""One rank of eight is run again alone, and two runs show where they part.

python examples/replay.py
"""

import tempfile
from pathlib import Path

import torch

from functional_ep import adamw, bisect, init_state, lm, make_train_step, record, replay
from sharding import Comm, Mesh, expert_parallel, make_plan, simulate, zero3

MESH = Mesh(edp=2, ep=4)
CFG = lm.Config(vocab=64, dim=32, layers=2, heads=2, experts=8, top_k=2, ffn=32)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
PARAMS, OPTIMIZER = lm.init(CFG, seed=0), adamw(1e-3)
PLAN = make_plan(PARAMS, lm.labels, RULES, MESH)
IDS = torch.randint(0, CFG.vocab, (3, 8, 17), generator=torch.Generator().manual_seed(0))


def make(comm: Comm):
    """All that a replay needs of a program."""
    return make_train_step(lm.loss(CFG, PLAN, comm), PLAN, OPTIMIZER, comm, clip=1.0)


def train(comm: Comm, run: Path, ids: torch.Tensor) -> float:
    step = record(make(comm), comm, run, steps=range(1, 3))
    state, metrics = init_state(PLAN.shard(PARAMS, comm), PLAN, OPTIMIZER), {}
    for row in ids[:, comm.rank : comm.rank + 1]:
        state, metrics = step(state, {"input_ids": row[:, :-1], "labels": row[:, 1:]})
    return float(metrics["grad_norm"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder, "one"), Path(folder, "other")
        norms = simulate(train, MESH, [one] * 8, [IDS] * 8)

        state, metrics = replay(one / "rank-00005" / "step-00000002", make)
        print(f"rank 5 alone, step {int(state.step) - 1}: norm {float(metrics['grad_norm']):.9f};")
        print(f"among the eight of them:  norm {norms[5]:.9f}")

        changed = IDS.clone()
        changed[1, 6, 3] += 1
        simulate(train, MESH, [other] * 8, [changed] * 8)
        print(bisect(one, other))
