"""A Mixture-of-Experts language model in a few pure functions of shards.

Shape suffixes: B sequences, S positions, T = B S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from sharding import Comm, Plan, sharded
from sharding.closed import is_mapped
from sharding.sharded import Backward

from .architecture import Config, Params, constants_of, functions, init, labels, shapes, units
from .cross_entropy import IGNORE, cross_entropy
from .differentiate import sum_over_ranks
from .routing import Statistics, balance_loss

Batch = Mapping[str, Tensor]

__all__ = ["Batch", "Config", "Params", "apply", "init", "labels", "loss", "shapes", "units"]


def apply(
    cfg: Config, plan: Plan, comm: Comm, backward: Backward = "regather", compile: bool = False
) -> Callable[..., Tensor]:
    """``logits(shards, input_ids, attention_mask=None)``: ``(B, S) -> (B, S, V)``.

    Args:
        cfg: the model.
        plan: of params in the shape of :func:`init`.
        comm: the ranks; all must call together, each with its own sequences.
        backward: see :func:`sharding.sharded`.
        compile: see :func:`loss`.
    """
    run = sharded(functions(cfg, plan, comm, compile), plan.at(units(plan.tree)), comm, backward)
    constants = partial(constants_of, cfg, plan)

    def logits(shards: Params, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return run(units(shards), input_ids, constants(input_ids, attention_mask))[0]

    return logits


def loss(
    cfg: Config, plan: Plan, comm: Comm, backward: Backward = "regather", compile: bool = False
) -> Callable[[Params, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """``loss(shards, batch) -> (sum, count, aux)``: cross-entropy and auxiliary losses, summed.

    The batch is ``dict(input_ids, labels, attention_mask)`` of ``(B, S)``, the mask optional;
    ``labels[b, s]`` is the token that follows position s, or -100 for none. Divided by the count of
    all ranks, the sum is the mean cross-entropy per label plus ``balance`` and ``z`` times their
    means per token. Aux holds sums: ``nll``, ``balance``, ``z``, ``tokens`` and
    ``tokens_per_expert (layers, E)``.

    Args:
        cfg: the model.
        plan: of params in the shape of :func:`init`.
        comm: the ranks.
        backward: see :func:`sharding.sharded`.
        compile: whether what lies between the experts of two blocks is compiled, see
            :func:`functional_ep.compiled`; the same numbers, up to rounding.

    Raises:
        ValueError: from the loss, for a batch without ids and labels of one shape.
    """
    run = sharded(functions(cfg, plan, comm, compile), plan.at(units(plan.tree)), comm, backward)
    constants = partial(constants_of, cfg, plan)

    def total(shards: Params, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        input_ids, targets = _checked(batch, cfg.vocab)
        beside = constants(input_ids, batch.get("attention_mask"))
        logits, layers = run(units(shards), input_ids, beside)
        nll = cross_entropy(logits.flatten(0, 1), targets.flatten())
        count = (targets != IGNORE).sum()
        balance, z, tokens, per_label = _auxiliary(cfg, layers, count, comm)
        auxiliary = (cfg.balance * balance + cfg.z * z) * per_label.to(z.dtype)
        counts_LE = torch.stack([layer.counts_E for layer in layers])
        sums = {"nll": nll, "balance": balance, "z": z}
        aux = {name: x.detach() for name, x in sums.items()}
        aux |= {"tokens": tokens, "tokens_per_expert": counts_LE}
        return nll + auxiliary, count, aux

    return total


def _auxiliary(
    cfg: Config, layers: tuple[Statistics, ...], count: Tensor, comm: Comm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Local balance and z sums, local tokens, and the global ratio of labels to tokens.

    One message for all layers: only integers travel, no gradient.
    """
    counts_LE = torch.stack([layer.counts_E for layer in layers])
    tokens = counts_LE[0].sum() // cfg.top_k
    all_LE, all_labels, all_tokens = sum_over_ranks([counts_LE, count, tokens], comm)
    balance = torch.stack(
        [balance_loss(layer.probs_E, c_E) for layer, c_E in zip(layers, all_LE, strict=True)]
    ).sum()
    z = torch.stack([layer.z for layer in layers]).sum()
    return balance, z, tokens, all_labels.double() / all_tokens.clamp(min=1)


def _checked(batch: Batch, vocab: int) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a dict of input_ids and labels, not {type(batch).__name__}")
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(f"batch[{name!r}] is missing; the batch has {sorted(batch)}")
    input_ids, targets = batch["input_ids"], batch["labels"]
    if input_ids.shape != targets.shape or input_ids.dim() != 2:
        raise ValueError(
            f"batch['input_ids'] {tuple(input_ids.shape)} and batch['labels'] "
            f"{tuple(targets.shape)} must have one shape (B, S)"
        )
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(
            f"batch['attention_mask'] {tuple(mask.shape)} must have the shape of the ids, "
            f"{tuple(input_ids.shape)}"
        )
    _check_range(input_ids, "input_ids", vocab)
    _check_range(targets, "labels", vocab, IGNORE)
    return input_ids, targets


def _check_range(ids: Tensor, name: str, vocab: int, other: int | None = None) -> None:
    """Refuse ids outside of the vocabulary, where reading them is not to wait for them."""
    if ids.device.type != "cpu" or not ids.numel() or is_mapped(ids):
        return
    wrong = (ids < 0) | (ids >= vocab)
    wrong = wrong if other is None else wrong & (ids != other)
    if bool(wrong.any()):
        allowed = f"0 to {vocab - 1}" + ("" if other is None else f", or {other} for none")
        raise ValueError(f"batch[{name!r}] has {int(ids[wrong][0])}: ids are {allowed}")
