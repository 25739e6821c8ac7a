"""A training for torchrun that is killed and goes on: see test_two_hosts.py.

    torchrun --nproc-per-node 2 tests/long_training.py DIRECTORY STEPS

Rank 0 writes a line per step, its loss to the last digit, to DIRECTORY/losses.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from functional_ep import Checkpoints, State, adamw, cosine, init_state, lm, make_train_step
from sharding import Comm, Mesh, distributed, expert_parallel, make_plan, zero3
from sharding.distributed.pairwise import PairwiseComm

EVERY = 3  # steps between two checkpoints
PATIENCE = 20.0  # seconds that ranks wait for each other
CFG = lm.Config(vocab=32, dim=16, layers=2, heads=2, experts=4, top_k=2, ffn=16)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


def batch_of(step: int, comm: Comm) -> dict[str, Tensor]:
    """This rank's part of eight sequences that depend on the step only."""
    ids = torch.randint(0, CFG.vocab, (8, 13), generator=torch.Generator().manual_seed(step))
    mine = ids.tensor_split(comm.mesh.size)[comm.rank]
    return {"input_ids": mine[:, :-1], "labels": mine[:, 1:]}


def train(comm: Comm, steps: int, directory: Path | None = None) -> list[float]:
    """The losses of these steps; with a directory, of those after its newest checkpoint."""
    params = lm.init(CFG, seed=0, dtype=torch.float64)
    plan = make_plan(params, lm.labels, RULES, comm.mesh)
    tx = adamw(cosine(3e-3, warmup=5, total=100))
    step = make_train_step(lm.loss(CFG, plan, comm), plan, tx, comm, clip=1.0)
    state: State | None = None
    if directory is not None:
        checkpoints = Checkpoints(directory / "saved", plan, comm, every=EVERY)
        state = checkpoints.restore()
    state = state or init_state(plan.shard(params, comm), plan, tx)
    losses: list[float] = []
    for number in range(int(state.step), steps):
        state, metrics = step(state, batch_of(number, comm))
        losses.append(float(metrics["loss"]))
        if directory is not None:
            checkpoints(state)
            if comm.rank == 0:
                with (directory / "losses").open("a") as lines:
                    lines.write(f"{number} {losses[-1]!r}\n")
    if directory is not None:
        checkpoints.wait()
    return losses


def main() -> None:
    directory, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    mesh = Mesh(edp=int(os.environ["WORLD_SIZE"]) // 2, ep=2)
    with distributed(mesh, timeout=PATIENCE, device="cpu") as comm:
        assert isinstance(comm, PairwiseComm)
        links = {peer: type(link).__name__ for peer, link in comm.links.items()}
        print(f"rank {comm.rank} reaches {links}", flush=True)
        train(comm, steps, directory)


if __name__ == "__main__":
    main()
