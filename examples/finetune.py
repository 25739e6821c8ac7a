"""Fine-tune a directory of weights on a text: all of them, some by pattern, or an adapter.

python examples/finetune.py MODEL TEXT OUT                              everything
python examples/finetune.py MODEL TEXT OUT --train "*.mlp.gate.*"       only the routers
python examples/finetune.py MODEL TEXT OUT --train "*.experts.*"        only the experts
python examples/finetune.py MODEL TEXT OUT --freeze "*.experts.*"       everything but the experts
python examples/finetune.py MODEL TEXT OUT --lora 8                     an adapter
torchrun --nproc-per-node 2 examples/finetune.py ...                    on two processes

OUT is a directory that from_pretrained loads; with --lora, one for PeftModel.from_pretrained.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import is_torchelastic_launched
from transformers import AutoTokenizer

from functional_ep import (
    adamw,
    cosine,
    freeze,
    from_huggingface,
    init_state,
    make_train_step,
    to_huggingface,
    train_only,
)
from sharding import Comm, Mesh, distributed, expert_parallel, make_plan, simulate, zero3

RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


def adapter(rank: int):
    from peft import LoraConfig

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], target_parameters=experts)


def program(comm: Comm, options: argparse.Namespace, tokens: Tensor) -> list[float]:
    model = from_huggingface(options.model, adapter=adapter(options.lora) if options.lora else None)
    select, patterns = (train_only, options.train) if options.train else (freeze, options.freeze)
    labels, rules, frozen = select(model.labels, RULES, *patterns)
    plan = make_plan(model.shapes, labels, rules, comm.mesh, frozen=frozen)
    optimizer = adamw(cosine(options.lr, warmup=options.steps // 10, total=options.steps))
    step = make_train_step(model.loss(plan, comm), plan, optimizer, comm, clip=1.0, donate=True)
    state, losses = init_state(model.load(plan, comm), plan, optimizer), []
    for number in range(options.steps):  # the same windows on every mesh, cut between the ranks
        random = torch.Generator().manual_seed(number)
        starts = torch.randint(len(tokens) - options.length, (options.batch,), generator=random)
        windows = torch.stack([tokens[i : i + options.length + 1] for i in starts.tolist()])
        mine = windows.tensor_split(comm.mesh.size)[comm.rank].to(comm.device)
        state, metrics = step(state, {"input_ids": mine[:, :-1], "labels": mine[:, 1:]})
        losses.append(float(metrics["loss"]))
    to_huggingface(options.out, state.params, plan, comm, model)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory of weights, with its tokenizer")
    parser.add_argument("text", type=Path, help="a file to learn from")
    parser.add_argument("out", type=Path, help="a directory that does not exist yet")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--train", nargs="+", default=[], help="patterns of what is trained")
    chosen.add_argument("--freeze", nargs="+", default=[], help="patterns of what is not")
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter; 0: none")
    parser.add_argument("--ep", type=int, default=2, help="ranks that split the experts")
    parser.add_argument("--edp", type=int, default=1, help="ranks that share each of these parts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="windows per step, over all ranks")
    parser.add_argument("--length", type=int, default=128, help="tokens per window")
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()
    if options.lora and not options.train:
        options.train = ["*.lora_*"]
    if options.out.exists():
        parser.error(f"{options.out} exists already: what is trained is written to a new directory")
    mesh = Mesh(edp=options.edp, ep=options.ep)
    text = options.text.read_text("utf-8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text)["input_ids"])
    if len(tokens) <= options.length:
        parser.error(f"{options.text} has {len(tokens)} tokens: --length has to be less")
    if is_torchelastic_launched():
        with distributed(mesh) as comm:
            rank, losses = comm.rank, program(comm, options, tokens)
    else:
        each = [options] * mesh.size, [tokens] * mesh.size
        rank, losses = 0, simulate(program, mesh, *each)[0]
    if rank == 0:
        print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps; {options.out}")


if __name__ == "__main__":
    main()
