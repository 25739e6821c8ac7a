"""A training moves to other axes and other rules half-way, and does not notice.

python examples/reshard.py
"""

import torch

from functional_ep import adamw, cosine, init_state, lm, make_train_step, reshard_state
from sharding import Comm, Mesh, Plan, expert_parallel, make_plan, replicated, simulate, zero3

CFG = lm.Config(vocab=64, dim=32, layers=2, heads=2, experts=8, top_k=2, ffn=32)
OPTIMIZER = adamw(cosine(3e-3, warmup=5, total=20))
IDS = torch.randint(0, CFG.vocab, (8, 33), generator=torch.Generator().manual_seed(0))

FIRST, THEN = Mesh(edp=4, ep=1), Mesh(edp=1, ep=4)
RULES = {
    FIRST: {"dense": zero3("edp"), "expert": zero3("edp")},
    THEN: {"dense": replicated(), "expert": expert_parallel("ep")},
}


def program(comm: Comm, ids: torch.Tensor, moves: bool) -> list[float]:
    params = lm.init(CFG, dtype=torch.float64)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    def on(mesh: Mesh):
        there = comm.on(mesh)
        plan: Plan = make_plan(params, lm.labels, RULES[mesh], mesh)
        return there, plan, make_train_step(lm.loss(CFG, plan, there), plan, OPTIMIZER, there)

    ranks, plan, step = on(FIRST)
    state, losses = init_state(plan.shard(params, ranks), plan, OPTIMIZER), []
    for number in range(20):
        if number == 10 and moves:
            old = plan
            ranks, plan, step = on(THEN)
            state = reshard_state(state, old, plan, ranks)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


if __name__ == "__main__":
    ids = IDS.tensor_split(FIRST.size)
    stays, moves = (simulate(program, FIRST, ids, [moves] * 4)[0] for moves in (False, True))
    off = max(abs(a - b) for a, b in zip(stays, moves, strict=True))
    print(f"loss {stays[0]:.6f} to {stays[-1]:.6f} on {FIRST};")
    print(f"the last ten steps on {THEN} instead: off by {off:.0e} at most")
