"""A MoE block forward and backward: what part of a square product's speed each system reaches.

    python examples/benchmarks/moe_block.py                       # on a GPU
    OMP_NUM_THREADS=1 python examples/benchmarks/moe_block.py --shrink 8 --tokens 512

Each computes the same block, from its tokens to the gradients of tokens, router and experts, in
turn: functional-ep, transformers with its grouped_mm, and liger-kernel's Triton kernels (which need
a GPU, and pip install liger-kernel). "products alone" are the six grouped products of all that on
rows which are sorted already, and nothing else. A system that cannot run says why.

Only the floating-point operations of experts are counted. The error is that of the gradients
against float32 by a loop over experts, |g - g32| / |g32| of the worst leaf. Times are those of a
GPU, or CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from moe_systems import (
    BLOCKS,
    SQUARE,
    SYSTEMS,
    Block,
    Inputs,
    Run,
    System,
    by_transformers,
    make_inputs,
    square,
)
from torch import Tensor

from sharding import Comm, Mesh, simulate

WARM_UP = 3
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # of bfloat16, by the makers' data sheets
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Measured(NamedTuple):
    """Of one system: seconds of each run, operations of a run, and what else was seen."""

    seconds: list[float]
    operations: float
    error: float | None = None  # of the gradients
    waits: int | None = None  # of the host, in a run
    failed: str = ""

    @property
    def speed(self) -> float:
        """Operations per second."""
        return self.operations / statistics.median(self.seconds)


def seconds_of(run: Run, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def waits_of(run: Run, device: torch.device) -> int | None:
    """How often the host waits for the GPU in a run."""
    if device.type == "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
    torch.cuda.synchronize()
    events: Any = profile.events()
    return sum(event.name in WAITS for event in events)


def error_of(found: Sequence[Tensor], right: Sequence[Tensor]) -> float | None:
    """``max over leaves of |g - g32| / |g32|``."""
    pairs = zip(found, right, strict=True) if found else ()
    return max((float((g.float() - r).norm() / r.norm()) for g, r in pairs), default=None)


def measure(
    block: Block, inputs: Inputs, systems: Mapping[str, System], rounds: int, comm: Comm
) -> dict[str, Measured]:
    device, found = inputs.x.device, dict[str, Measured]()
    runs: dict[str, Run] = {}
    # The same numbers as the others see, computed in float32 by a loop over experts.
    right = [g.detach() for g in by_transformers("eager")(block, inputs.to(torch.float32), comm)()]
    products = 18.0 * len(inputs.x) * block.top_k * block.dim * block.ffn
    side = 8192 if device.type == "cuda" else 1024
    for name, system in {SQUARE: square(side), **systems}.items():
        try:
            runs[name] = system(block, inputs, comm)
            for _ in range(WARM_UP - 1):
                runs[name]()
            error = error_of(runs[name](), right)
            waits = waits_of(runs[name], device)
            found[name] = Measured([], products if name != SQUARE else 2.0 * side**3, error, waits)
        except Exception as problem:
            runs.pop(name, None)
            said = " ".join(str(problem).split())[:100]
            found[name] = Measured([], 0.0, failed=f"{type(problem).__name__}: {said}")
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].seconds.append(seconds_of(run, device))
    return found


def table(found: Mapping[str, Measured], peak: float | None) -> str:
    """A row for each system; speeds are those of the median time."""
    lines = [f"{'':26}{'ms, median (range)':>30}{'TFLOP/s':>9}{'of square':>11}{'error':>9}"]
    lines[0] += f"{'waits':>7}" + (f"{'MFU':>7}" if peak else "")
    for name, each in found.items():
        if each.failed:
            lines.append(f"{name:26}  not run: {each.failed}")
            continue
        ms = sorted(1e3 * s for s in each.seconds)
        times = f"{statistics.median(ms):.2f} ({ms[0]:.2f} to {ms[-1]:.2f})"
        share = each.speed / found[SQUARE].speed
        error = "-" if each.error is None else f"{each.error:.0e}"
        waits = "-" if each.waits is None else str(each.waits)
        line = f"{name:26}{times:>30}{each.speed / 1e12:>9.3f}{share:>11.2f}{error:>9}{waits:>7}"
        lines.append(line + (f"{each.speed / peak:>7.2f}" if peak else ""))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shrink", type=int, default=1, help="what widths are divided by")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, one thread"
    peaks = [peak for name, peak in PEAKS.items() if name in card and args.dtype == "bfloat16"]
    print(
        f"{card}, torch {torch.__version__}, {args.dtype}, {args.tokens} tokens, {args.rounds} runs"
    )
    for name in args.blocks:
        whole = BLOCKS[name]
        block = whole._replace(dim=whole.dim // args.shrink, ffn=whole.ffn // args.shrink)
        inputs = make_inputs(block, args.tokens, device).to(getattr(torch, args.dtype))
        print(f"\n{name}: {block}")

        def program(comm: Comm, block: Block = block, inputs: Inputs = inputs) -> Any:
            return measure(block, inputs, SYSTEMS, args.rounds, comm)

        (found,) = simulate(program, Mesh(), device=device)
        print(table(found, peaks[0] if peaks else None), flush=True)


if __name__ == "__main__":
    main()
