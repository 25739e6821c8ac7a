"""CPU time of a converted model over the plain one: one rank, a tiny model of many layers.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 1 examples/benchmarks/huggingface.py

Forward and backward of the same batch, in turn. The plain model computes its experts eagerly, with
transformers' grouped_mm, and with the functions that the converted one uses (``same``): the last
comparison shows what conversion costs by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MixtralConfig

from functional_ep import from_huggingface
from functional_ep.huggingface.experts import Place, decorated
from sharding import Comm, Mesh, distributed, expert_parallel, make_plan, zero3

RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


def plain(experts: str, size: argparse.Namespace, comm: Comm) -> Any:
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=size.width,
        intermediate_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("eager" if experts == "same" else experts)
    if experts == "same":
        for layer in model.model.layers:
            place = Place(config.num_local_experts, (), comm, lambda ids: None)
            layer.mlp.experts.forward = decorated(layer.mlp.experts, place)
    return model


def timed(f: Callable[[], Any]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def ratios(experts: str, size: argparse.Namespace, comm: Comm) -> tuple[list[float], list[float]]:
    """CPU seconds of each step of the plain model, and how many times that the converted takes."""
    model, batch = plain(experts, size, comm), make_batch(size.length)
    bare = from_huggingface(model)
    plan = make_plan(bare.shapes, bare.labels, RULES, comm.mesh)
    loss = bare.loss(plan, comm)
    shards = {name: x.requires_grad_() for name, x in bare.load(plan, comm).items()}

    def ours() -> None:
        torch.autograd.grad(loss(shards, batch)[0], list(shards.values()))

    def theirs() -> None:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        total = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        torch.autograd.grad(total, list(model.parameters()))

    seconds: list[float] = []
    times: list[float] = []
    for i in range(size.steps + 3):
        pair = (timed(theirs), timed(ours)) if i % 2 else (timed(ours), timed(theirs))[::-1]
        seconds.append(pair[0])
        times.append(pair[1] / pair[0])
    return seconds[3:], sorted(times[3:])


def make_batch(length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 256, (2, length + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=64, help="of the model, and of an expert")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--length", type=int, default=32, help="of each of two sequences")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each kind")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args}")
    with distributed(Mesh(edp=1, ep=1), device="cpu") as comm:
        for experts in ("eager", "grouped_mm", "same"):
            report(experts, *ratios(experts, args, comm))


def report(experts: str, seconds: list[float], times: list[float]) -> None:
    quarter = len(times) // 4
    print(
        f"{experts}: plain {statistics.median(seconds) * 1e3:.1f} ms, converted "
        f"{statistics.median(times):.3f} times that (quartiles {times[quarter]:.3f} to "
        f"{times[-quarter - 1]:.3f}, {len(times)} steps)"
    )


if __name__ == "__main__":
    main()
