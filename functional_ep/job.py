"""A training as its arguments ask for it: all that is settled before the first rank starts."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch

from sharding import Mesh

from . import config, data
from .config import Recipe
from .corpus import Corpus, read, standard_library
from .huggingface import from_huggingface
from .progress import Progress, find_progress
from .vocabulary import of_directory

WEIGHTS, CHECKPOINTS, JOURNAL = "weights", "checkpoints", "metrics.jsonl"


class Job(NamedTuple):
    """What to train, on what, where, and what an earlier run of it has left to go on with."""

    recipe: Recipe
    corpus: Corpus
    mesh: Mesh
    device: torch.device
    out: Path
    progress: Progress


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
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out to use the CPU")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or _default_out(recipe, corpus)
    if recipe.weights:
        if recipe.model != Recipe().model:
            raise ValueError("model.* describes a new model, but --model loads one: set only one")
        of_directory(Path(recipe.weights))
    how = dict(every=options.save_every, keep=options.keep, restart=options.restart)
    progress = find_progress(out / CHECKPOINTS, recipe, corpus, **how)
    if recipe.weights and (out / WEIGHTS).exists():
        raise ValueError(f"{out / WEIGHTS} exists already: move it away, or give another --out")
    return Job(recipe, corpus, mesh, torch.device(device), out, progress)


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
    """The mesh asked for, if ranks and experts allow it; the default mesh without a wish."""
    if text is None:
        return default_mesh(ranks, experts)
    mesh = parse_mesh(text)
    if mesh.size != ranks:
        raise ValueError(
            f"--mesh {text} has {mesh.size} ranks, and there are {ranks}; start {mesh.size} "
            f"(torchrun --nproc-per-node {mesh.size} ..., or --simulate {mesh.size}), or choose "
            f"sizes whose product is {ranks}"
        )
    if experts % mesh["ep"]:
        raise ValueError(
            f"--mesh {text}: {experts} experts do not divide by the {mesh['ep']} ranks along ep; "
            f"choose an ep that divides {experts}"
        )
    return mesh


def _default_out(recipe: Recipe, corpus: Corpus) -> Path:
    """The same for every mesh, so that a run goes on with other ranks than it began with."""
    described = f"{config.dumps(recipe)}{corpus.origin}"
    return Path("runs", blake2b(described.encode(), digest_size=4).hexdigest())
