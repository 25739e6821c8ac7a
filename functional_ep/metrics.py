"""What a run says about itself: one JSON object per step, and a progress bar."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Record = dict[str, Any]


def imbalance(tokens_per_expert: Tensor) -> float:
    """max over experts / mean over experts, averaged over layers.

    1 is even, the number of experts is one expert for all; a layer without tokens counts as even.
    ``tokens_per_expert``: [layers, experts].

    >>> imbalance(torch.tensor([[2, 2], [4, 0]]))
    1.5
    """
    counts = tokens_per_expert.double()
    mean = counts.mean(dim=-1)
    return torch.where(mean > 0, counts.amax(dim=-1) / mean, 1.0).mean().item()


def bits_per_byte(nll: Tensor | float, count: Tensor | float) -> float:
    """nll / (count ln 2): the cross-entropy in nats, summed over ``count`` bytes, per byte in bits.

    >>> bits_per_byte(6 * math.log(2), 2)
    3.0
    """
    return float(nll) / (float(count) * math.log(2)) if float(count) else math.nan


def record(step: int, metrics: Mapping[str, Tensor], bytes_per_token: float = 1.0) -> Record:
    """One step in plain numbers and lists, ready for JSON.

    Every metric of the step is kept under its name; bits per byte and imbalance are derived.
    """
    predicted = metrics["count"] * bytes_per_token
    return {
        "step": step,
        "bits_per_byte": bits_per_byte(metrics["nll"], predicted),
        "imbalance": imbalance(metrics["tokens_per_expert"]),
    } | {name: value.tolist() for name, value in metrics.items()}


def line(entry: Record) -> str:
    """One line of JSON; a number that JSON does not have (nan, inf) becomes null.

    >>> line({"step": 3, "loss": math.nan})
    '{"step": 3, "loss": null}\\n'
    """
    return json.dumps(_finite(entry), allow_nan=False) + "\n"


def read(path: str | Path) -> list[Record]:
    """The records of a file of such lines."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(text) for text in file]


@contextmanager
def journal(path: Path, steps: int, done: int = 0) -> Iterator[Callable[[Record], None]]:
    """A function that writes each record it is given to ``path`` at once, and shows it on a bar.

    The bar is on standard error, and only where that is a terminal; evaluations get a line of
    their own everywhere. Records of steps up to ``done`` stay; later ones are of steps that are
    made again.
    """
    from tqdm import tqdm

    _cut(path, done)
    bar = tqdm(total=steps, initial=done, unit="step", disable=None, dynamic_ncols=True)
    with bar, open(path, "a", encoding="utf-8") as file:

        def log(entry: Record) -> None:
            file.write(line(entry))
            file.flush()
            bar.update()
            bar.set_postfix_str(_brief(entry), refresh=False)
            if "valid_bits_per_byte" in entry:
                tqdm.write(
                    f"step {entry['step']:>6,}   validation {entry['valid_bits_per_byte']:.3f} "
                    f"bits per byte   {_brief(entry)}"
                )

        yield log


def _cut(path: Path, done: int) -> None:
    """Leave the records of steps up to ``done``, at every moment in one piece."""
    kept = done and path.exists()  # a journal may be gone; the states are what a run goes on with
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if kept else []
    shorter = path.with_name(f".{path.name}.incomplete")
    shorter.write_text("".join(f"{x}\n" for x in lines if _step(x) <= done), encoding="utf-8")
    shorter.replace(path)


def _step(text: str) -> float:
    """The step of a line; infinite for one that was cut short when its machine went down."""
    try:
        return json.loads(text)["step"]
    except ValueError:
        return math.inf


def require_extras() -> None:
    """Refuse at once, not after the training, when tqdm or matplotlib is absent."""
    absent = [name for name in ("tqdm", "matplotlib") if find_spec(name) is None]
    if absent:
        raise ModuleNotFoundError(
            f"training needs {' and '.join(absent)} for its progress bar and its plot; "
            "install the extra: pip install 'functional-ep[train]'"
        )


def _brief(entry: Record) -> str:
    return (
        f"loss {entry['bits_per_byte']:.3f} bits, {entry['tokens_per_s']:,.0f} tokens/s, "
        f"imbalance {entry['imbalance']:.2f}"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value
