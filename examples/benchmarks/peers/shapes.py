"""What is trained: shapes of Qwen3-MoE models, and how much of which text a step reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE model; ``width`` is the hidden width of one expert."""

    hidden: int
    layers: int
    experts: int
    top_k: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 2048


SHAPES: Mapping[str, Shape] = {
    "A": Shape(256, 4, experts=16, top_k=4, width=256, heads=4, kv_heads=2, head_dim=32),
    "B": Shape(256, 4, experts=64, top_k=2, width=512, heads=4, kv_heads=2, head_dim=32),
    "C": Shape(512, 8, experts=64, top_k=2, width=512, heads=8, kv_heads=4, head_dim=64),
    "D": Shape(768, 8, experts=8, top_k=2, width=256, heads=12, kv_heads=12, head_dim=64),
    "tiny": Shape(32, 2, 4, top_k=2, width=16, heads=2, kv_heads=1, head_dim=16, vocab=64),
}


@dataclass(frozen=True)
class Job:
    """One training: a model, in float32 or with bfloat16 compute, and the batch of a rank.

    ``ranks`` counts the batches of a step; one process trains all of them.
    """

    shape: Shape
    dtype: str = "float32"
    length: int = 256
    sequences: int = 2
    ranks: int = 2

    @property
    def tokens(self) -> int:
        """Of one step, over all ranks."""
        return self.ranks * self.sequences * self.length

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, shape: str, dtype: str, length: int, ranks: int) -> Job:
        """As it is compared: one sequence for each rank if they are long, else two."""
        return cls(SHAPES[shape], dtype, length, 2 if length <= 256 else 1, ranks)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        return cls(Shape(**values["shape"]), **{k: v for k, v in values.items() if k != "shape"})
