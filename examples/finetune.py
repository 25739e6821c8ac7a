"""Fine-tune a directory of weights on a text: all of them, some by pattern, or an adapter.

python examples/finetune.py MODEL TEXT OUT                              everything
python examples/finetune.py MODEL TEXT OUT --train "*.mlp.gate.*"       only the routers
python examples/finetune.py MODEL TEXT OUT --train "*.experts.*"        only the experts
python examples/finetune.py MODEL TEXT OUT --freeze "*.experts.*"       everything but the experts
python examples/finetune.py MODEL TEXT OUT --lora 8                     an adapter
python examples/finetune.py MODEL TEXT OUT --valid OTHER_TEXT           and what it is worth there
torchrun --nproc-per-node 2 examples/finetune.py ...                    on two processes

OUT is a directory that from_pretrained loads; with --lora, one for PeftModel.from_pretrained.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

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
    make_evaluate,
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


class Texts(NamedTuple):
    """Tokens to learn from, and tokens to judge by."""

    train: Tensor
    valid: Tensor


def program(
    comm: Comm, options: argparse.Namespace, texts: Texts
) -> tuple[list[float], list[float]]:
    """The loss of each step, and those of the other text before and after all of them."""
    model = from_huggingface(options.model, adapter=adapter(options.lora) if options.lora else None)
    select, patterns = (train_only, options.train) if options.train else (freeze, options.freeze)
    labels, rules, frozen = select(model.labels, RULES, *patterns)
    plan = make_plan(model.shapes, labels, rules, comm.mesh, frozen=frozen)
    optimizer = adamw(cosine(options.lr, warmup=options.steps // 10, total=options.steps))
    loss, losses, worth = model.loss(plan, comm), [], []
    step = make_train_step(loss, plan, optimizer, comm, clip=1.0, donate=True)
    evaluate = make_evaluate(model.loss(plan, comm, training=False), plan, comm)
    state = init_state(model.load(plan, comm), plan, optimizer)
    if options.valid:
        worth.append(evaluate(state.params, batches_of(texts.valid, options, comm)))
    for number in range(options.steps):  # the same windows on every mesh, cut between the ranks
        random = torch.Generator().manual_seed(number)
        starts = torch.randint(
            len(texts.train) - options.length, (options.batch,), generator=random
        )
        windows = torch.stack([texts.train[i : i + options.length + 1] for i in starts.tolist()])
        state, metrics = step(
            state, batch_of(windows.tensor_split(comm.mesh.size)[comm.rank], comm)
        )
        losses.append(float(metrics["loss"]))
    if options.valid:
        worth.append(evaluate(state.params, batches_of(texts.valid, options, comm)))
    to_huggingface(options.out, state.params, plan, comm, model)
    return losses, [float(each["loss"]) for each in worth]


def batches_of(text: Tensor, options: argparse.Namespace, comm: Comm) -> list[dict[str, Tensor]]:
    """This rank's part of all windows of a text; others may have a batch more."""
    windows = text.unfold(0, options.length + 1, options.length)[comm.rank :: comm.mesh.size]
    return [batch_of(part, comm) for part in windows.split(options.batch)]


def batch_of(windows: Tensor, comm: Comm) -> dict[str, Tensor]:
    windows = windows.to(comm.device)
    return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory of weights, with its tokenizer")
    parser.add_argument("text", type=Path, help="a file to learn from")
    parser.add_argument("out", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--valid", type=Path, help="a file to judge by, before and after")
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
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def read(path: Path) -> Tensor:
        tokens = torch.tensor(tokenizer(path.read_text("utf-8"))["input_ids"])
        if len(tokens) <= options.length:
            parser.error(f"{path} has {len(tokens)} tokens: --length has to be less")
        return tokens

    texts = Texts(read(options.text), read(options.valid or options.text))
    if is_torchelastic_launched():
        with distributed(mesh) as comm:
            rank, (losses, worth) = comm.rank, program(comm, options, texts)
    else:
        each = [options] * mesh.size, [texts] * mesh.size
        rank, (losses, worth) = 0, simulate(program, mesh, *each)[0]
    if rank == 0:
        print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps; {options.out}")
        if options.valid:
            print(f"on {options.valid}: {worth[0]:.4f} to {worth[1]:.4f}")


if __name__ == "__main__":
    main()
