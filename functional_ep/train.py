"""The training program: one function of (comm, job), the same on every mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharding import Comm

from . import data, metrics
from .agreement import check_agreement
from .config import Recipe
from .corpus import fingerprint
from .data import Baselines, Batch
from .evaluate import make_evaluate
from .job import WEIGHTS, Job
from .program import CannotStart, Program, build
from .progress import saving
from .stopping import Stopped, Wish

PROMPT = b"def "
TEMPERATURE = 0.8

Log = Callable[[metrics.Record], None]


class Report(NamedTuple):
    """What a run came to. ``sample`` is empty but on rank 0."""

    description: str
    valid_bits_per_byte: float
    baselines: Baselines
    parameters: int
    sample: str


def train(comm: Comm, job: Job, log: Log, wish: Wish) -> Report:
    """Train the recipe of ``job`` on its corpus; ``log`` is called with one record for each step.

    The records are the same, up to rounding and speed, on every rank of every mesh. States are
    saved on the way, and the newest is gone on with: the numbers are those of a run that never
    stopped, to the bit on the same mesh. Where weights were loaded, what they have become is
    written as soon as the last step is made.

    Raises:
        ValueError: on every rank, when they have not read the same corpus, or cannot start with it.
        FloatingPointError: on every rank, when the loss is no longer finite.
        Stopped: on every rank, after the step in which one of them was asked to stop, and its
            evaluation; after the last step the run is brought to its end instead.
    """
    recipe, corpus = job.recipe, job.corpus
    check_agreement(fingerprint(corpus), "corpus", comm)
    program = build(comm, recipe)
    text, valid = _training(program, corpus.train, recipe), corpus.valid[: recipe.eval_bytes]
    judge, baselines = evaluation(program, valid, recipe, comm), data.baselines(valid)
    bytes_per_token = len(corpus.train) / len(text)

    with saving(job.progress, recipe, corpus, program.plan, comm) as saved:
        state, bits = saved.start(program.start), math.nan
        for number in range(int(state.step) + 1, recipe.steps + 1):
            started = perf_counter()
            _seed(recipe, number - 1, comm)
            state, measured = program.step(state, _batch(text, recipe, number - 1, comm))
            entry = metrics.record(number, measured, bytes_per_token)
            entry["tokens_per_s"] = entry["count"] / (perf_counter() - started)
            _refuse_infinite(entry, recipe, log)
            if number % recipe.eval_every == 0 or number == recipe.steps:
                entry["valid_bits_per_byte"] = bits = judge(state.params)
                entry |= baselines._asdict()
            log(entry)
            if number < recipe.steps and wish.granted(comm):
                raise Stopped(wish, number, saved.now(state))
            saved.keep(state, last=number == recipe.steps)
    program.save(state, job.out / WEIGHTS)  # at once: nothing that comes after can lose them
    bits = judge(state.params) if math.isnan(bits) else bits
    sample = generate(program, state.params, recipe, comm)
    return Report(program.description, bits, baselines, program.parameters, sample)


def _training(program: Program, text: Tensor, recipe: Recipe) -> Tensor:
    tokens = _encoded(program, text)
    if len(tokens) <= recipe.seq:
        raise CannotStart(
            f"the training text has {len(tokens)} tokens, fewer than one window of seq + 1 = "
            f"{recipe.seq + 1}: give more --data, or a smaller seq"
        )
    return tokens


def _encoded(program: Program, text: Tensor) -> Tensor:
    tokens = program.vocabulary.encode(text)
    if len(tokens) and int(tokens.max()) >= program.tokens:
        raise CannotStart(
            f"the tokenizer makes token {int(tokens.max())}, but the model knows {program.tokens}: "
            "the two do not belong together"
        )
    return tokens


def _refuse_infinite(entry: metrics.Record, recipe: Recipe, log: Log) -> None:
    if not math.isfinite(entry["loss"]):
        log(entry)
        raise FloatingPointError(
            f"the loss is {entry['loss']} at step {entry['step']}, gradient norm "
            f"{entry['grad_norm']:.3g}; lower lr = {recipe.lr:g}, or warm up for longer"
        )


def evaluation(
    program: Program, text: Tensor, recipe: Recipe, comm: Comm
) -> Callable[[Any], float]:
    """``bits(shards)`` per byte of ``text``: each token but the first is predicted once.

    All ranks predict together. The text is tokenised here, once for all evaluations.

    Raises:
        CannotStart: a text of fewer than two tokens, with nothing to predict.
    """
    tokens = _encoded(program, text)
    if len(tokens) < 2:
        raise CannotStart(
            f"the validation text has {len(tokens)} tokens, and predicting needs 2: give more "
            "--data, or a larger eval_bytes"
        )
    predicted = len(text) - len(program.vocabulary.decode(tokens[:1].tolist()))
    size = {"sequences": 4 * recipe.batch, "length": recipe.seq}
    evaluate = make_evaluate(program.loss, program.plan, comm)

    def bits(shards: Any) -> float:
        windows = data.windows(tokens, **size, rank=comm.rank, ranks=comm.mesh.size)
        sums = evaluate(shards, (_to(batch, comm.device) for batch in windows))
        return metrics.bits_per_byte(sums["nll"], predicted)

    return bits


@torch.no_grad()
def generate(program: Program, shards: Any, recipe: Recipe, comm: Comm) -> str:
    """What rank 0 writes after ``def ``; the other ranks, without a token, lend their experts."""
    speaks, vocabulary = comm.rank == 0, program.vocabulary
    generator = torch.Generator().manual_seed(recipe.seed)
    text: list[int] = vocabulary.encode(torch.tensor(list(PROMPT), dtype=torch.uint8)).tolist()
    for _ in range(recipe.sample):
        context = torch.tensor([text[-recipe.seq :]], device=comm.device)
        seen = context if speaks else context[:0]
        scores = program.logits(shards, seen)[:, -1].float().cpu()
        chances = torch.softmax(scores / TEMPERATURE, dim=-1)
        text.append(int(torch.multinomial(chances, 1, generator=generator)) if speaks else 0)
    return _readable(vocabulary.decode(text)) if speaks else ""


def _readable(text: bytes) -> str:
    """As text, with a mark for what would steer a terminal instead of showing on it."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)


def _batch(text: Tensor, recipe: Recipe, step: int, comm: Comm) -> Batch:
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
        comm.device,
    )


def _seed(recipe: Recipe, step: int, comm: Comm) -> None:
    """Random numbers, of dropout say, from the step as well: none before it has to be drawn."""
    torch.manual_seed(data.seed_of(f"{recipe.seed}/{step}/{comm.rank}"))


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
