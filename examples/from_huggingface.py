"""Train any Hugging Face MoE model: its experts follow EP, the rest ZeRO-3; no model code.

python examples/from_huggingface.py                            two ranks in this process
torchrun --nproc-per-node 2 examples/from_huggingface.py       two processes, the same numbers
"""

import torch
from torch.distributed import is_torchelastic_launched
from transformers import AutoModelForCausalLM, MixtralConfig

from functional_ep import adamw, cosine, from_huggingface, init_state, make_train_step
from sharding import Comm, Mesh, distributed, expert_parallel, make_plan, simulate, zero3

MESH = Mesh(edp=1, ep=2)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
CONFIG = MixtralConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    output_router_logits=True,
)


def program(comm: Comm) -> list[float]:
    torch.manual_seed(0)
    model = from_huggingface(AutoModelForCausalLM.from_config(CONFIG))  # or a directory of weights
    plan = make_plan(model.shapes, model.labels, RULES, comm.mesh)
    optimizer = adamw(cosine(3e-3, warmup=5, total=20))
    step = make_train_step(model.loss(plan, comm), plan, optimizer, comm, clip=1.0)
    state = init_state(model.load(plan, comm), plan, optimizer)
    ids = torch.randint(3, 64, (8, 33))[comm.rank :: comm.mesh.size]
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    losses: list[float] = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


if __name__ == "__main__":
    if is_torchelastic_launched():
        with distributed(MESH) as comm:
            rank, losses = comm.rank, program(comm)
    else:
        rank, losses = 0, simulate(program, MESH)[0]
    if rank == 0:
        print(f"loss {losses[0]:.6f} after one step, {losses[-1]:.6f} after {len(losses)}")
