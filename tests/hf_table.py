"""Writes docs/huggingface.md: every MoE model type that transformers knows, converted and compared.

    python tests/hf_table.py > docs/huggingface.md

A model type is one that a causal, an image-text or a sequence-to-sequence auto class builds. It is
a MoE type if its tiny model has routed experts, or if its file mentions them.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from hf_cases import RTOL, batch_of, build, converted, reference, worst
from hf_configs import AUTOS, CONVERTED, tiny_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from functional_ep.huggingface import from_huggingface
from functional_ep.huggingface.detect import is_routed
from functional_ep.huggingface.skeleton import skeleton_from
from sharding import Mesh, simulate

MESH = Mesh(edp=2, ep=2)
LARGEST = 20_000_000  # parameters of a model that is compared
MARKS = re.compile(r"use_experts_implementation|\btop_k_index\b|class \w*(SparseMLP|CDMoE)\(")
HEAD = """# Hugging Face models

Written by `tests/hf_table.py`, which builds a tiny model of every MoE model type that
transformers {transformers} knows, converts it, and compares loss, logits and the gradient of every
parameter with plain transformers in one process (float32, eager experts), on {mesh}
with uneven, padded sequences. *Error* is the largest difference, divided by the largest entry of
its leaf; the bound is {bound}. `tests/test_T14_huggingface.py` checks the same on more meshes.

A converted model is closed under `grad`, `vjp`, `jvp` and their compositions as far as its own
operations are. It refuses `vmap`, whose lanes would send different rows to different experts.
`backward="recompute"` gives the bits of the other modes, but for a few types whose gradients differ
in the last digits (inkling2, inkling2_text, switch_transformers), and is refused where a part uses
the parameters of another (deepseek_ocr2, unlimited_ocr, zaya).

| model type | architecture | status | error |
|---|---|---|---|
"""


class Row(NamedTuple):
    model_type: str
    architecture: str
    status: str
    error: str = ""

    def __str__(self) -> str:
        return f"| {self.model_type} | {self.architecture} | {self.status} | {self.error} |"


def types() -> Iterator[str]:
    for model_type in sorted(CONFIG_MAPPING):
        if any(CONFIG_MAPPING[model_type] in auto._model_mapping for auto in AUTOS):
            yield model_type


def is_marked(model_type: str) -> bool:
    """Whether the model's file mentions routed experts."""
    config: Any = CONFIG_MAPPING[model_type]
    found: Any = next(a._model_mapping[config] for a in AUTOS if config in a._model_mapping)
    found = found[0] if isinstance(found, tuple) else found
    source = importlib.import_module(found.__module__).__file__
    return bool(MARKS.search(Path(str(source)).read_text("utf-8")))


def row(model_type: str) -> Row | None:
    """None for a type without routed experts."""
    architecture = "?"
    try:
        skeleton = skeleton_from(tiny_config(model_type), None)
        architecture = type(skeleton).__name__
        if not any(map(is_routed, skeleton.modules())):
            return (
                Row(model_type, architecture, "none in the tiny model")
                if is_marked(model_type)
                else None
            )
        from_huggingface(skeleton)
    except Exception as error:
        if not is_marked(model_type):
            return None
        kind = "refused" if "cannot be converted" in str(error) else "not checked"
        return Row(model_type, architecture, f"{kind}: {line(error)}")
    size = sum(p.numel() for p in skeleton.parameters())
    if size > LARGEST:
        return Row(model_type, architecture, f"not checked: {size:,} parameters with small values")
    try:
        model = build(model_type)
        batch = batch_of(model)
        expected = reference(model, batch)
        found = simulate(lambda comm: converted(comm, model, batch), MESH)
    except Exception as error:
        return Row(model_type, architecture, f"not checked: {line(error)}")
    error = worst(found, expected)
    return Row(
        model_type, architecture, "converted" if error <= RTOL else "differs", f"{error:.1e}"
    )


def line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return text[:160] + ("..." if len(text) > 160 else "")


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(HEAD.format(transformers=transformers.__version__, mesh=MESH, bound=RTOL), end="")
    found: list[Row] = []
    for model_type in types():
        one = row(model_type)
        if one is not None:
            print(one, flush=True)
            found.append(one)
    kinds = {
        kind: sum(r.status.startswith(kind) for r in found) for kind in ("converted", "refused")
    }
    lost = set(CONVERTED) - {r.model_type for r in found if r.status == "converted"}
    assert not lost, f"{sorted(lost)} were converted before"
    rest = len(found) - sum(kinds.values())
    print(f"\n{kinds['converted']} converted, {kinds['refused']} refused, {rest} not checked.")
    print("A type is not checked where no tiny model of it could be built or compared here.")


if __name__ == "__main__":
    sys.exit(main())
