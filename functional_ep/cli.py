"""The console command ``functional-ep``: arguments in, one call of the program out."""

from __future__ import annotations

import argparse
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch

from sharding import Comm, Mesh, distributed, simulate
from sharding.distributed import VARIABLES

from . import config, data, metrics
from .config import Recipe
from .corpus import Corpus, read, standard_library
from .huggingface import from_huggingface
from .malloc import keep_freed_memory
from .plot import plot
from .program import CannotStart
from .train import Report, train
from .vocabulary import of_directory

WEIGHTS = "weights"


class Job(NamedTuple):
    """All that the arguments settle before the first rank starts."""

    recipe: Recipe
    corpus: Corpus
    mesh: Mesh
    device: torch.device
    out: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the console command; a wrong argument ends the process with one line that says why."""
    options = parser().parse_args(arguments)
    launched = all(name in os.environ for name in VARIABLES)
    try:
        metrics.require_extras()
        job = prepare(options, int(os.environ["WORLD_SIZE"]) if launched else None)
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        raise SystemExit(f"functional-ep {options.command}: {error}") from error
    keep_freed_memory()
    try:
        if launched:
            with distributed(job.mesh, device=job.device.type) as comm:
                run(comm, job)
        else:
            simulate(run, job.mesh, [job] * job.mesh.size)
    except (FloatingPointError, CannotStart) as error:
        raise SystemExit(f"functional-ep {options.command}: {error}") from error


def prepare(options: argparse.Namespace, launched: int | None) -> Job:
    """The job that the arguments ask for, on ``launched`` processes or, without a launcher, on one.

    Raises:
        OSError, ValueError, TypeError: what is wrong with the arguments, and how to mend it.
    """
    if launched and options.simulate:
        raise ValueError(
            f"--simulate {options.simulate} inside one of {launched} processes of torchrun; "
            "leave out --simulate, or start without torchrun"
        )
    if options.simulate is not None and options.simulate < 1:
        raise ValueError(f"--simulate {options.simulate}: give the number of ranks, at least 1")
    recipe = config.load(Recipe(), options.config) if options.config else Recipe()
    for assignment in options.set:
        recipe = config.assign(recipe, assignment)
    if options.model:
        recipe = replace(recipe, weights=str(options.model))
    ranks = launched or options.simulate or 1
    mesh = mesh_of(options.mesh, ranks, experts_of(recipe))
    corpus = read(options.data) if options.data else standard_library()
    data.check(corpus, recipe.seq)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or _default_out(recipe, corpus, mesh)
    if recipe.weights:
        if recipe.model != Recipe().model:
            raise ValueError("model.* describes a new model, but --model loads one: set only one")
        of_directory(Path(recipe.weights))
        if (out / WEIGHTS).exists():
            raise ValueError(f"{out / WEIGHTS} exists already: move it away, or give another --out")
    return Job(recipe, corpus, mesh, torch.device(device), out)


def run(comm: Comm, job: Job) -> Report:
    """The program of one rank: train, and on rank 0 keep a journal, draw the plot and say it."""
    recipe, corpus, _, device, out = job
    weights = out / WEIGHTS if recipe.weights else None
    if comm.rank > 0:
        return train(comm, recipe, corpus, device=device, log=lambda _: None, weights=weights)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.toml").write_text(config.dumps(recipe), encoding="utf-8")
    print(corpus.origin)
    with metrics.journal(out / "metrics.jsonl", recipe.steps) as log:
        report = train(comm, recipe, corpus, device=device, log=log, weights=weights)
    plot(metrics.read(out / "metrics.jsonl"), out / "training.png", title=headline(report, job))
    print(summary(report, job))
    return report


def headline(report: Report, job: Job) -> str:
    """One line on model and mesh."""
    return (
        f"{report.parameters / 1e6:.1f} M parameters: {report.description}; {job.mesh}, "
        f"{report.tokens / report.seconds:,.0f} tokens/s"
    )


def summary(report: Report, job: Job) -> str:
    """The last words of a run."""
    unigram, xz = report.baselines
    predicted = min(job.recipe.eval_bytes, len(job.corpus.valid)) - 1
    written = f"\n{job.out / WEIGHTS}" if job.recipe.weights else ""
    return f"""
{headline(report, job)}
{report.tokens:,} tokens in {report.seconds / 60:.1f} minutes of training

validation, {predicted:,} bytes      bits per byte
  this model        {report.valid_bits_per_byte:.3f}
  xz -9e            {xz:.3f}
  unigram entropy   {unigram:.3f}

{textwrap.indent(report.sample, "  | ", lambda _: True)}

{job.out / "metrics.jsonl"}
{job.out / "training.png"}{written}"""


def experts_of(recipe: Recipe) -> int:
    """A number that the ranks along ep have to divide."""
    if not recipe.weights:
        return recipe.model.experts
    return math.gcd(*from_huggingface(recipe.weights).experts.values())


def default_mesh(ranks: int, experts: int) -> Mesh:
    """ep = the largest divisor of ``ranks`` that divides ``experts``; edp = the rest.

    >>> default_mesh(6, experts=8), default_mesh(8, experts=4), default_mesh(3, experts=8)
    (Mesh(edp=3, ep=2), Mesh(edp=2, ep=4), Mesh(edp=3, ep=1))
    """
    ep = max(n for n in range(1, ranks + 1) if ranks % n == 0 and experts % n == 0)
    return Mesh(edp=ranks // ep, ep=ep)


def parse_mesh(text: str) -> Mesh:
    """The mesh of ``"edp=2,ep=4"``: axes in that order, and an axis left out has one rank.

    >>> parse_mesh("ep=2")
    Mesh(edp=1, ep=2)
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in ("edp", "ep") or axis in sizes or not size.isdecimal():
            raise ValueError(
                f"--mesh {text}: cannot read {part!r}; give each of the axes edp and ep "
                "at most once, as in --mesh edp=2,ep=4"
            )
        sizes[axis] = int(size)
    order = sizes if len(sizes) == 2 else ("edp", "ep")
    return Mesh(**{axis: sizes.get(axis, 1) for axis in order})


def mesh_of(text: str | None, ranks: int, experts: int) -> Mesh:
    """The mesh asked for, if it has as many ranks as there are; the default mesh without a wish."""
    if text is None:
        return default_mesh(ranks, experts)
    mesh = parse_mesh(text)
    if mesh.size != ranks:
        raise ValueError(
            f"--mesh {text} has {mesh.size} ranks, and there are {ranks}; start {mesh.size} "
            f"(torchrun --nproc-per-node {mesh.size} ..., or --simulate {mesh.size}), or choose "
            f"sizes whose product is {ranks}"
        )
    return mesh


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    command = argparse.ArgumentParser(
        prog="functional-ep", description="Mixture-of-Experts training as pure functions."
    )
    subcommands = command.add_subparsers(dest="command", required=True)
    training = subcommands.add_parser(
        "train",
        help="train a byte-level language model",
        description="Train a byte-level MoE language model: in this process alone, on simulated\n"
        "ranks (--simulate N), or on real ones (torchrun --nproc-per-node N -m functional_ep\n"
        "train).",
        epilog="the recipe that --config and --set change:\n\n" + config.dumps(Recipe()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = training.add_argument
    add("--data", nargs="+", metavar="PATH", help="files and directories to learn from, instead of "
        "Python's standard library")  # fmt: skip
    add("--model", type=Path, metavar="DIR", help="weights of any transformers MoE model, to train "
        "instead of a new one; what they become is written to OUT/weights")  # fmt: skip
    add("--mesh", metavar="edp=1,ep=2", help="its axes; by default as much ep as the experts allow")
    add("--simulate", type=int, metavar="N", help="N ranks in this one process")
    add("--config", metavar="FILE.toml", help="a recipe")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one value of the recipe, "
        "as in model.layers=2; repeatable")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="for metrics and plot; by default under runs/")
    add("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    return command


def _default_out(recipe: Recipe, corpus: Corpus, mesh: Mesh) -> Path:
    described = f"{config.dumps(recipe)}{corpus.origin}"
    digest = blake2b(described.encode(), digest_size=4).hexdigest()
    return Path("runs", "-".join(f"{axis}{mesh[axis]}" for axis in mesh.axes) + f"-{digest}")
