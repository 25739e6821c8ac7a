"""Where rounding decides which expert a token goes to, in plain transformers alone.

    python examples/benchmarks/near_ties.py --shape C --length 1024

The one-process model is trained twice on the same batches: on all sequences at once, and rank by
rank, as systems on several ranks see them. Products of other sizes round otherwise. Where the k-th
expert of a token leads the next by no more than that, the token goes elsewhere, and losses of a
right system are not those of the reference any more: each such choice is printed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers.agreement import COMPARED
from peers.model import CLIP, batch_of, mean_loss, optimizer_of, read_model, write_weights
from peers.shapes import SHAPES, Job
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Tie(NamedTuple):
    """Tokens of a layer that went elsewhere, and the least lead that an expert of theirs had."""

    layer: int
    tokens: int
    lead: float


class Training:
    """A model of its own, and the router logits of each layer in the last step."""

    def __init__(self, weights: Path) -> None:
        self.model = read_model(weights)
        self.optimizer = optimizer_of(self.model.parameters())
        self.logits: list[list[Tensor]] = []
        for block in self.model.model.layers:
            heard: list[Tensor] = []
            self.logits.append(heard)
            block.mlp.gate.register_forward_hook(_hears(heard))

    def step(self, parts: Sequence[Batch]) -> float:
        """One step on the mean of all parts, of equal size."""
        for heard in self.logits:
            heard.clear()
        total = 0.0
        for ids, targets in parts:
            logits = self.model(input_ids=ids, use_cache=False).logits
            loss = mean_loss(logits, targets) / len(parts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def _hears(heard: list[Tensor]) -> Any:
    def hook(gate: Any, args: Any, output: tuple[Tensor, ...]) -> None:
        heard.append(output[0].detach())

    return hook


def ties(whole: Sequence[Tensor], apart: Sequence[Tensor], k: int) -> Iterator[Tie]:
    """Layers in which tokens choose other experts, by their logits ``(T, E)``.

    >>> near, far = torch.tensor([[3.0, 2.0, 1.9]]), torch.tensor([[3.0, 1.9, 2.0]])
    >>> [(tie.layer, tie.tokens) for tie in ties([near, near], [near, far], k=2)]
    [(1, 1)]
    """
    for layer, (a, b) in enumerate(zip(whole, apart, strict=True)):
        chosen = [logits.topk(k).indices.sort().values for logits in (a, b)]
        other = (chosen[0] != chosen[1]).any(1)
        if other.any():
            best = a[other].topk(k + 1).values
            lead = (best[:, k - 1] - best[:, k]).min().item()
            yield Tie(layer, int(other.sum()), lead)


def compare(job: Job, weights: Path, steps: int) -> Iterator[tuple[float, float, list[Tie]]]:
    """For each step its loss at once and rank by rank, and the choices that differ."""
    whole, apart = Training(weights), Training(weights)
    for i in range(steps):
        parts = [batch_of(job, i, rank) for rank in range(job.ranks)]
        ids, targets = map(torch.cat, zip(*parts, strict=True))
        losses = whole.step([(ids, targets)]), apart.step(parts)
        a, b = ([torch.cat(heard) for heard in each.logits] for each in (whole, apart))
        yield *losses, list(ties(a, b, job.shape.top_k))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="C")
    parser.add_argument("--length", type=int, default=1024, help="of sequences")
    parser.add_argument("--steps", type=int, default=COMPARED)
    args = parser.parse_args()
    job = Job.of(args.shape, "float32", args.length, ranks=2)
    with tempfile.TemporaryDirectory(prefix="weights-") as directory:
        write_weights(job, Path(directory))
        for i, (loss, other, found) in enumerate(compare(job, Path(directory), args.steps)):
            print(f"step {i}: {loss:.7f} at once, {other:.7f} rank by rank")
            for layer, tokens, lead in found:
                print(f"    layer {layer}: tokens elsewhere {tokens}, least lead {lead:.1e}")


if __name__ == "__main__":
    main()
