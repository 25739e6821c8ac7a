"""Compare two recorded runs: where they part first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functional_ep.recordings.file import (
    ABOUT,
    About,
    asked_of,
    read_about,
    read_tensors,
)
from functional_ep.recordings.trees import Json, shown

When = tuple[int, int, int]  # phase of the step, number of the collective, sent or received


class Difference(NamedTuple):
    """Where two runs part: the first step, the rank and the leaf or collective in it.

    >>> print(Difference(3, 1, "batches[0]['x']", None, "1 of 8 numbers differs"))
    step 3, rank 1: batches[0]['x'] differs: 1 of 8 numbers differs
    """

    step: int
    rank: int
    what: str
    collective: int | None
    detail: str

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"step {self.step}, rank {self.rank}: {self.what} differs{detail}"


class _Found(NamedTuple):
    when: When
    what: str
    name: str  # of a tensor that both recordings hold, or nothing


def bisect(run_a: str | Path, run_b: str | Path) -> Difference | None:
    """The first of all differences between two recorded runs; None if there is none.

    In a step a rank is given a state and batches, then collective follows collective, each sent
    before it is received, then come the new state and metrics. What differs first in this order
    differs by itself: everything that it depends on was the same.

    Args:
        run_a: a directory that :func:`record` has written to.
        run_b: another one, of the same mesh. Ranks and steps that both hold are compared.

    Raises:
        ValueError: no recordings, none of the same rank and step, or other meshes.

    >>> bisect("nowhere", "elsewhere")
    Traceback (most recent call last):
      ...
    ValueError: nowhere has no recordings: no rank-*/step-*/recording.json is in it
    """
    a, b = _recordings(Path(run_a)), _recordings(Path(run_b))
    both = sorted(a.keys() & b.keys())
    if not both:
        raise ValueError(f"{run_a} and {run_b} have no step of a rank in common")
    steps = dict.fromkeys(step for step, _ in both)
    for step in steps:
        found: list[tuple[When, int, _Found]] = []
        for rank in (rank for at, rank in both if at == step):
            one, other = read_about(a[step, rank]), read_about(b[step, rank])
            if one.mesh != other.mesh:
                raise ValueError(f"{run_a} is of {one.mesh}, {run_b} of {other.mesh}")
            found += [(each.when, rank, each) for each in _differences(one, other)]
        if found:
            _, rank, first = min(found)
            detail = _detail(a[step, rank], b[step, rank], first.name) if first.name else ""
            collective = first.when[1] if first.when[0] == 2 else None
            return Difference(step, rank, first.what, collective, detail)
    return None


def _recordings(run: Path) -> dict[tuple[int, int], Path]:
    found: dict[tuple[int, int], Path] = {}
    for path in run.glob(f"rank-*/step-*/{ABOUT}"):
        rank, step = (part.partition("-")[2] for part in path.parts[-3:-1])
        if rank.isdecimal() and step.isdecimal():  # else it was never whole, or is not ours
            found[int(step), int(rank)] = path.parent
    if not found:
        raise ValueError(f"{run} has no recordings: no rank-*/step-*/{ABOUT} is in it")
    return found


def _differences(a: About, b: About) -> Iterator[_Found]:
    """What differs in a step of a rank, with when in the step it does."""
    for phase, part in enumerate(("state", "batches")):
        if a.before[part] != b.before[part]:
            yield _Found((phase, 0, 0), f"the structure of {part}", "")
        for name in sorted(a.tensors.keys() & b.tensors.keys()):
            if name.split("/")[0] == part and _unlike(a.tensors[name], b.tensors[name]):
                yield _Found((phase, 0, 0), shown(name), name)
    inside = [*_of_collectives(a, b), *_of_results(a, b)]
    if inside and any(
        _unlike(a.tensors[n], b.tensors[n])
        for n in a.tensors.keys() & b.tensors.keys()
        if n.startswith("random/")
    ):  # a stream that differs matters only if something comes of it
        yield _Found((1, 1, 0), "the random stream", "")
    yield from inside


def _of_collectives(a: About, b: About) -> Iterator[_Found]:
    for number, (one, other) in enumerate(zip(a.collectives, b.collectives, strict=False)):
        label = f"collective no. {number}, {asked_of(one)},"
        if asked_of(one) != asked_of(other):
            yield _Found((2, number, 0), f"{label} is {asked_of(other)} in the other run: it", "")
            return
        for i, (x, y) in enumerate(zip(one["digests"], other["digests"], strict=True)):
            if x != y:
                yield _Found((2, number, 0), f"tensor {i} sent to {label[:-1]}", "")
        for i, name in enumerate(one["received"] or ()):
            if other["received"] and _unlike(a.tensors[name], b.tensors[name]):
                yield _Found((2, number, 1), f"tensor {i} received from {label[:-1]}", name)
    if len(a.collectives) != len(b.collectives):
        at = min(len(a.collectives), len(b.collectives))
        counts = f"{len(a.collectives)} against {len(b.collectives)}"
        yield _Found((2, at, 0), f"the number of collectives, {counts},", "")


def _of_results(a: About, b: About) -> Iterator[_Found]:
    if a.ended != b.ended:
        yield _Found((3, 0, 0), f"the end ({a.ended or 'none'}; {b.ended or 'none'})", "")
    for name in sorted(a.result.keys() | b.result.keys()):
        if a.result.get(name) != b.result.get(name):
            yield _Found((3, 0, 1), f"after the step, {shown(name)}", "")


def _unlike(a: Json, b: Json) -> bool:
    return a["digest"] != b["digest"]


def _detail(a: Path, b: Path, name: str) -> str:
    """How many numbers differ, and the first of them."""
    pair: list[Any] = [read_tensors(f, read_about(f), [name])[name] for f in (a, b)]
    x, y = (each.cpu().contiguous().reshape(-1) for each in pair)
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{tuple(pair[0].shape)} {x.dtype} against {tuple(pair[1].shape)} {y.dtype}"
    words = [each.view(torch.uint8).view(len(each), -1) for each in (x, y)]
    unlike = (words[0] != words[1]).any(1).nonzero().flatten().tolist()
    one, other = x[unlike[0]].item(), y[unlike[0]].item()
    return f"{len(unlike)} of {len(x)} numbers, the first at {unlike[0]}: {one!r} against {other!r}"
