"""A training is saved on one mesh, and goes on from the files: on the same one, and on others.

python examples/checkpoint.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from functional_ep import adamw, cosine, init_state, lm, make_train_step, restore, save
from functional_ep.checkpoint import describe
from sharding import Comm, Mesh, expert_parallel, make_plan, replicated, simulate, zero3

CFG = lm.Config(vocab=64, dim=32, layers=2, heads=2, experts=8, top_k=2, ffn=32)
OPTIMIZER = adamw(cosine(3e-3, warmup=5, total=20))
STEPS, HALF = 20, 10
RULES = {
    Mesh(edp=2, ep=2): {
        "dense": zero3("edp", "ep"),
        "expert": expert_parallel("ep", store=("edp",)),
    },
    Mesh(edp=3): {"dense": zero3("edp"), "expert": zero3("edp")},
    Mesh(): {"dense": replicated(), "expert": replicated()},
}


def program(comm: Comm, path: Path, load: bool) -> list[torch.Tensor]:
    """Train to the end, saving half-way; or begin half-way, with what was saved."""
    params = lm.init(CFG, dtype=torch.float64)
    plan = make_plan(params, lm.labels, RULES[comm.mesh], comm.mesh)
    step = make_train_step(lm.loss(CFG, plan, comm), plan, OPTIMIZER, comm)
    if load:
        state = restore(path, plan, comm)
    else:
        state = init_state(plan.shard(params, comm), plan, OPTIMIZER)
    while int(state.step) < STEPS:
        stream = torch.Generator().manual_seed(int(state.step))
        ids = torch.randint(0, CFG.vocab, (12, 33), generator=stream)
        ids = ids.tensor_split(comm.mesh.size)[comm.rank]
        state, _ = step(state, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        if int(state.step) == HALF and not load:
            save(path, state, plan, comm, metadata={"experts": CFG.experts})
    return plan.flatten(plan.full(state.params, comm))


if __name__ == "__main__":
    with TemporaryDirectory() as directory:
        path, first, *_ = Path(directory) / "half-way", *RULES
        whole = simulate(program, first, [path] * first.size, [False] * first.size)[0]
        found = describe(path)
        print(
            f"step {found.step}, saved on {first}: {len(found.leaves)} leaves, {found.bytes} bytes"
        )
        for mesh in RULES:
            resumed = simulate(program, mesh, [path] * mesh.size, [True] * mesh.size)[0]
            off = max(float((a - b).abs().max()) for a, b in zip(whole, resumed, strict=True))
            print(f"ten more steps on {mesh}: off by {off:.0e}")
