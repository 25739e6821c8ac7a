"""The objective: cross-entropy per label, and the model's own load-balancing loss.

Shape suffixes: B sequences, S positions, L layers, E experts, K choices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from functional_ep.cross_entropy import cross_entropy
from functional_ep.differentiate import sum_over_ranks
from functional_ep.huggingface.idle import standing_in, without_zeros
from functional_ep.huggingface.replica import Replica
from functional_ep.huggingface.shift import IGNORE
from functional_ep.routing import count_experts
from functional_ep.wide import wide
from sharding import Comm

Batch = Mapping[str, Any]
RouterLoss = Literal["global", "micro_batch"]


class Balance(NamedTuple):
    """How a model weighs its load-balancing loss, and whether its formula is the one we know."""

    coefficient: float
    top_k: int
    is_known: bool


def balance_of(model: Any) -> Balance | None:
    """What the config says of the model's load-balancing loss; none, if it has no weight."""
    config = model.config.get_text_config()
    coefficient = getattr(model, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    if coefficient is None or top_k is None:
        return None
    return Balance(float(coefficient), int(top_k), _formula_is_known(model))


def load_balance(
    logits: tuple[Tensor, ...], top_k: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over layers and tokens that are not padding: choices, probabilities, and rows.

    With ``f = choices / rows`` and ``P = probabilities / rows``, each ``(E,)``, transformers'
    ``load_balancing_loss_func`` is ``E sum_e f_e P_e``.
    """
    probs = torch.stack([torch.softmax(x, -1) for x in logits])
    experts = probs.shape[-1]
    ids = probs.detach().topk(top_k, dim=-1).indices
    probs = wide(probs)
    if mask is None:
        rows = torch.full((), probs.shape[0] * probs.shape[1], device=probs.device)
        return count_experts(ids, experts), probs.sum((0, 1)), rows
    valid = mask.reshape(-1).bool()
    counted = torch.where(valid[:, None], ids, experts)
    choices = count_experts(counted, experts + 1)[:-1]
    return choices, (valid.to(probs.dtype) @ probs).sum(0), valid.sum() * len(probs)


def _formula_is_known(model: Any) -> bool:
    """Whether the function that the model's file calls computes ``E sum_e f_e P_e``, as tried."""
    theirs = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if theirs is None:
        return False
    random = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(6, 5, generator=random) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    for given in (None, mask):
        choices, probs, rows = load_balance(logits, 2, given)
        ours = 5 * (choices / rows * probs / rows).sum()
        try:
            found = theirs(logits, 5, 2, given)
        except Exception:  # a function of that name with another signature is another formula
            return False
        if not torch.allclose(torch.as_tensor(found), ours):
            return False
    return True


class Objective:
    """``(sum, count, aux)`` of a batch: see :meth:`Model.loss`."""

    def __init__(self, replica: Replica, balance: Balance | None, form: RouterLoss) -> None:
        if form not in get_args(RouterLoss):
            raise ValueError(f"router_loss={form!r}: choose one of {get_args(RouterLoss)}")
        self.replica, self.balance, self.form = replica, balance, form
        self.comm: Comm = replica.comm

    def __call__(
        self, shards: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        inputs, labels = _checked(batch)
        mask = batch.get("attention_mask")
        if not labels.numel():
            inputs = standing_in(inputs)
            labels = labels.new_full(without_zeros(labels), IGNORE)
            mask = torch.zeros_like(labels)
        outputs = self.replica(shards, **inputs)
        logits = outputs.logits
        if logits.shape[:-1] != labels.shape:
            name = type(self.replica.model).__name__
            raise ValueError(
                f"{name} gives logits {tuple(logits.shape)} for labels {tuple(labels.shape)}, not "
                "one for each: use model.apply and a loss of your own"
            )
        if getattr(outputs, "encoder_aux_loss", None) is not None:
            raise ValueError(
                "router losses of encoder and decoder are not added here: leave "
                "output_router_logits out of the batch, or use model.apply and a loss of your own"
            )
        nll = cross_entropy(logits.flatten(0, -2), labels.flatten())
        count = (labels != IGNORE).sum()
        everything = torch.full((), labels.numel(), device=labels.device)
        tokens = everything if mask is None else mask.sum()
        aux = {"nll": nll.detach(), "tokens": tokens}
        aux |= self._tokens_per_expert(mask)
        total = nll
        if getattr(outputs, "aux_loss", None) is not None and self.balance is not None:
            weighed, balance = self._router_loss(outputs, self.balance, mask, count)
            total, aux["balance"] = total + weighed, balance.detach()
        return total, count, aux

    def _router_loss(
        self, outputs: Any, balance: Balance, mask: Tensor | None, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is added to the sum, and the sum over tokens for the metrics."""
        if self.form == "micro_batch":
            own = outputs.aux_loss
            return balance.coefficient * own * count, own * count
        if not balance.is_known:
            raise ValueError(
                f"{type(self.replica.model).__name__}: its router loss is not E sum_e f_e P_e, so "
                "it cannot be computed on statistics of all ranks. Use router_loss='micro_batch', "
                "or output_router_logits=False in its config"
            )
        layers = outputs.router_logits
        choices, probs, rows = load_balance(layers, balance.top_k, mask)
        all_choices, all_rows, all_labels = sum_over_ranks([choices, rows, count], self.comm)
        fractions = all_choices.to(probs.dtype) / all_rows.clamp(min=1)
        local = len(probs) * (fractions * probs).sum()
        per_row = (all_labels.double() / all_rows.clamp(min=1)).to(probs.dtype)
        return balance.coefficient * local * per_row, local / len(layers)

    def _tokens_per_expert(self, mask: Tensor | None) -> dict[str, Tensor]:
        """``(L, E)`` choices of tokens that are not padding; layers with fewer experts end in 0."""
        chosen = self.replica.chosen
        if not chosen:
            return {}
        widths = [self.replica.experts[path] for path in chosen]
        width = max(widths)
        valid = None if mask is None else mask.reshape(-1).bool()
        rows: list[Tensor] = []
        for layer, ids in enumerate(chosen.values()):
            if valid is not None and len(valid) == len(ids):
                ids = torch.where(valid[:, None], ids, width)
            rows.append(ids.reshape(-1) + layer * (width + 1))  # all layers are counted at once
        counts = count_experts(torch.cat(rows), len(rows) * (width + 1))
        return {"tokens_per_expert": counts.view(len(rows), width + 1)[:, :-1]}


def _checked(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """The model's inputs and the labels, which it does not get to see: it would shift them."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a dict of input_ids and labels, not {type(batch).__name__}")
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if labels is None or ids is None:
        raise ValueError(
            f"a batch has input_ids and labels, and labels[b, s] is the token that follows "
            f"position s; found {sorted(batch)}"
        )
    if labels is ids:
        raise ValueError(
            "batch['labels'] are the input ids themselves, but here labels[b, s] is the token that "
            "follows position s: give next_tokens(input_ids), of functional_ep.huggingface"
        )
    if labels.shape != ids.shape or labels.dim() != 2:
        raise ValueError(
            f"batch['input_ids'] {tuple(ids.shape)} and batch['labels'] {tuple(labels.shape)} "
            "must have one shape (B, S)"
        )
    return inputs, labels


Loss = Callable[[Mapping[str, Tensor], Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]
