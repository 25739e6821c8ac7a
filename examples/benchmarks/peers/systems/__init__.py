"""One module for each kind of system; a module's imports are not part of what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class System(NamedTuple):
    """Where a system is written down, with which options, and where it can be imported."""

    module: str
    options: Mapping[str, Any] = {}
    environment: str = ""  # of :mod:`peers.environments`; empty: this one
    processes: int | None = None  # by default one for each rank
    threads: int = 1

    @property
    def is_ours(self) -> bool:
        return self.module == "ours"

    @property
    def is_peer(self) -> bool:
        """Whether it is another's, on as many ranks."""
        return self.processes is None and not self.is_ours


REFERENCE = "transformers, one process"

SYSTEMS: Mapping[str, System] = {
    REFERENCE: System("single", processes=1, threads=2),
    "transformers compiled, one process": System(
        "single", {"compile": True}, processes=1, threads=2
    ),
    "FSDP2": System("fsdp2"),
    "transformers EP + FSDP2": System("transformers_ep"),
    "torchtitan EP + FSDP2": System("titan", environment="torchtitan"),
    "DeepSpeed ZeRO-3": System("zero", {"stage": 3, "ep": 0}, "deepspeed"),
    "DeepSpeed AutoEP + ZeRO-3": System("zero", {"stage": 3, "ep": 2}, "deepspeed"),
    "DeepSpeed AutoEP + ZeRO-2": System("zero", {"stage": 2, "ep": 2}, "deepspeed"),
    "functional-ep, keep": System("ours", {"backward": "keep"}),
    "functional-ep, regather": System("ours", {"backward": "regather"}),
    "functional-ep, recompute": System("ours", {"backward": "recompute"}),
    "functional-ep compiled, keep": System("ours", {"backward": "keep", "compile": True}),
    "functional-ep compiled, regather": System("ours", {"backward": "regather", "compile": True}),
}
