"""Train a tiny Mixture-of-Experts on 1, 2, 4 and 8 ranks, in one process: the same gradients."""

import torch
from optree import tree_leaves

from functional_ep import adamw, cosine, init_state, lm, make_train_step
from sharding import Comm, Mesh, expert_parallel, make_plan, simulate, zero3

cfg = lm.Config(vocab=64, dim=32, layers=2, heads=2, experts=8, top_k=2, ffn=32)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
ids = torch.randint(0, cfg.vocab, (8, 33), generator=torch.Generator().manual_seed(0))


def program(comm: Comm, ids: torch.Tensor):  # the same under torchrun
    params = lm.init(cfg, seed=0, dtype=torch.float64)
    plan = make_plan(params, lm.labels, RULES, comm.mesh)
    optimizer = adamw(cosine(3e-3, warmup=5, total=10))
    loss = lm.loss(cfg, plan, comm)
    step = make_train_step(loss, plan, optimizer, comm, clip=1.0)
    state = init_state(plan.shard(params, comm), plan, optimizer)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    for _ in range(10):
        state, metrics = step(state, batch)
    grads = torch.func.grad(lambda shards: loss(shards, batch)[0])(state.params)
    return float(metrics["loss"]), plan.full(grads, comm)


expected = None
for edp, ep in [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4)]:
    mesh = Mesh(edp=edp, ep=ep)
    loss, grads = simulate(program, mesh, ids.tensor_split(mesh.size))[0]
    found = torch.cat([g.flatten() for g in tree_leaves(grads)])
    expected = found if expected is None else expected
    off = (found - expected).abs().max() / expected.abs().max()
    print(f"{mesh.size} ranks, edp={edp} ep={ep}: loss {loss:.12f}, gradient off by {off:.0e}")
