"""The training program: one function of (comm, recipe, corpus), the same on every mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from sharding import Comm, Precision, expert_parallel, make_plan, zero3
from sharding.collectives import psum

from . import data, lm, metrics
from .agreement import check_agreement
from .config import Recipe
from .corpus import Corpus, fingerprint
from .data import Baselines, Batch
from .optim import adamw
from .schedules import cosine
from .state import State, init_state
from .train_step import make_train_step

PROMPT = b"def "
TEMPERATURE = 0.8
PRECISION = {"fp32": Precision(), "bf16": Precision(compute=torch.bfloat16)}

Log = Callable[[metrics.Record], None]
Loss = Callable[[Any, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


class Report(NamedTuple):
    """What a run came to. ``seconds`` counts the steps only; ``sample`` is empty but on rank 0."""

    valid_bits_per_byte: float
    baselines: Baselines
    parameters: int
    seconds: float
    tokens: int
    sample: str


class Program(NamedTuple):
    """One rank's functions of the shards, and the state they start from."""

    parameters: int
    loss: Loss
    logits: Callable[[Any, Tensor], Tensor]
    step: Callable[[State, Batch], tuple[State, dict[str, Tensor]]]
    state: State


def build(comm: Comm, recipe: Recipe, device: torch.device) -> Program:
    """The recipe's model, optimizer and train step on this rank of the mesh."""
    params: Any = lm.init(recipe.model, seed=recipe.seed)
    params = optree.tree_map(lambda leaf: leaf.to(device), params)
    rules = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
    plan = make_plan(params, lm.labels, rules, comm.mesh, PRECISION[recipe.precision])
    warmup = int(recipe.warmup * recipe.steps)
    schedule = cosine(recipe.lr, warmup=warmup, total=recipe.steps)
    tx = adamw(schedule, weight_decay=recipe.weight_decay)
    loss = lm.loss(recipe.model, plan, comm, backward="regather")
    return Program(
        sum(math.prod(leaf.shape) for leaf in plan.leaves),
        loss,
        lm.apply(recipe.model, plan, comm),
        make_train_step(loss, plan, tx, comm, clip=recipe.clip, donate=True),
        init_state(plan.shard(params, comm), plan, tx),
    )


def train(comm: Comm, recipe: Recipe, corpus: Corpus, *, device: torch.device, log: Log) -> Report:
    """Train ``recipe`` on ``corpus``; ``log`` is called with one record for each step.

    The records are the same, up to rounding and speed, on every rank of every mesh.

    Raises:
        ValueError: on every rank, when they have not read the same corpus.
        FloatingPointError: on every rank, when the loss is no longer finite.
    """
    check_agreement(fingerprint(corpus), "corpus", comm)
    parameters, loss, logits, step, state = build(comm, recipe, device)
    valid = corpus.valid[: recipe.eval_bytes]
    baselines = data.baselines(valid)
    seconds, tokens, entry = 0.0, 0, metrics.Record()
    for number in range(1, recipe.steps + 1):
        started = perf_counter()
        state, measured = step(state, _batch(corpus.train, recipe, number - 1, comm, device))
        entry = metrics.record(number, measured)
        elapsed = perf_counter() - started
        entry["tokens_per_s"] = entry["count"] / elapsed
        seconds, tokens = seconds + elapsed, tokens + entry["count"]
        if not math.isfinite(entry["loss"]):
            log(entry)
            raise FloatingPointError(
                f"the loss is {entry['loss']} at step {number}, gradient norm "
                f"{entry['grad_norm']:.3g}; lower lr = {recipe.lr:g}, or warm up for longer"
            )
        if number % recipe.eval_every == 0 or number == recipe.steps:
            entry["valid_bits_per_byte"] = evaluate(loss, state.params, valid, recipe, comm, device)
            entry |= baselines._asdict()
        log(entry)
    sample = generate(logits, state.params, recipe, comm, device)
    bits = entry["valid_bits_per_byte"]
    return Report(bits, baselines, parameters, seconds, tokens, sample)


@torch.no_grad()
def evaluate(
    loss: Loss, shards: Any, text: Tensor, recipe: Recipe, comm: Comm, device: torch.device
) -> float:
    """Bits per byte of ``text``, each byte but the first predicted once, by all ranks together."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    place = {"rank": comm.rank, "ranks": comm.mesh.size}
    for batch in data.windows(text, sequences=4 * recipe.batch, length=recipe.seq, **place):
        _, count, aux = loss(shards, _to(batch, device))
        sums += torch.stack([aux["nll"].double(), count.double()])
    return metrics.bits_per_byte(*psum(sums, comm.mesh.axes, comm).tolist())


@torch.no_grad()
def generate(
    logits: Callable[[Any, Tensor], Tensor],
    shards: Any,
    recipe: Recipe,
    comm: Comm,
    device: torch.device,
) -> str:
    """What rank 0 writes after ``def ``; the other ranks, without a token, lend their experts."""
    speaks = comm.rank == 0
    generator = torch.Generator().manual_seed(recipe.seed)
    text = list(PROMPT)
    for _ in range(recipe.sample):
        context = torch.tensor([text[-recipe.seq :]], device=device)
        scores = logits(shards, context if speaks else context[:0])[:, -1].float().cpu()
        chances = torch.softmax(scores / TEMPERATURE, dim=-1)
        text.append(int(torch.multinomial(chances, 1, generator=generator)) if speaks else 0)
    return _readable(bytes(text)) if speaks else ""


def _readable(text: bytes) -> str:
    """As text, with a mark for what would steer a terminal instead of showing on it."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)


def _batch(text: Tensor, recipe: Recipe, step: int, comm: Comm, device: torch.device) -> Batch:
    return _to(
        data.batch(
            text,
            recipe.seed,
            step,
            sequences=recipe.batch,
            length=recipe.seq,
            rank=comm.rank,
            ranks=comm.mesh.size,
        ),
        device,
    )


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
