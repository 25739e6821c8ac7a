"""A rule of one's own, and its laws.

Say the routers are small but many, and gathering them over the whole mesh costs more messages than
it saves memory: split them over ``edp`` only, with a copy on every rank along ``ep``. A rule is two
tuples of axis names; what it means for shards, gathers and reductions follows, and one line checks
it.

    python examples/own_rule.py
"""

import torch

from functional_ep import adamw, init_state, label_by_path, lm, make_train_step
from sharding import Comm, Mesh, Rule, expert_parallel, interval, make_plan, simulate, zero3
from sharding.testing import check_rule

# 1. The rule: stored in edp parts; ep is named nowhere, so every rank along it holds a copy.
rule = Rule(store=("edp",))

# 2. Its laws (tiling, round trip, view, adjoint, isolation, accounting, purity), on random meshes
#    and shapes. In a test file this line is the whole test.
check_rule(rule, max_examples=50)
print("the laws hold for", rule)

# 3. Where the shards of a leaf of 8 entries are: each is one interval, with two copies of each.
mesh = Mesh(edp=2, ep=2)
for rank in mesh:
    lo, hi = interval(rule, mesh, rank, (8,))
    print(f"rank {rank} {mesh.coords(rank)} holds [{lo}, {hi})")

# 4. In use: a label for the leaves, the rule for the label.
cfg = lm.Config(vocab=64, dim=32, layers=2, heads=2, experts=4, top_k=2, ffn=32)
labels = label_by_path({"*/experts/*": "expert", "*/router": "router"}, default="dense")
RULES = {
    "dense": zero3("edp", "ep"),
    "expert": expert_parallel("ep", store=("edp",)),
    "router": rule,
}


def program(comm: Comm, ids: torch.Tensor) -> float:
    params = lm.init(cfg, seed=0)
    plan = make_plan(params, labels, RULES, comm.mesh)
    if comm.rank == 0 and comm.mesh.size > 1:
        print(plan)
    # Labels choose optimizers too: routers learn more slowly, and do not decay.
    optimizers = dict.fromkeys(RULES, adamw(3e-3)) | {"router": adamw(1e-3, weight_decay=0.0)}
    step = make_train_step(lm.loss(cfg, plan, comm), plan, optimizers, comm, clip=1.0)
    state = init_state(plan.shard(params, comm), plan, optimizers)
    losses: list[float] = []
    for _ in range(10):
        state, metrics = step(state, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        losses.append(float(metrics["loss"]))
    return losses[-1]


ids = torch.randint(0, cfg.vocab, (8, 17), generator=torch.Generator().manual_seed(0))
for ranks in (Mesh(edp=1, ep=1), mesh):
    loss = simulate(program, ranks, ids.tensor_split(ranks.size))[0]
    print(f"loss after 10 steps on {ranks}: {loss:.6f}")
