"""How far a run has come: its states on disk, and whether it may go on with the newest."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sharding import Comm, Plan

from . import config
from .agreement import check_agreement, together
from .checkpoint import Checkpoints, committed, describe
from .checkpoint.disk import DISK
from .checkpoint.folder import discard
from .config import Recipe
from .corpus import Corpus, fingerprint
from .program import CannotStart
from .state import State

ONLY_SEEN = {"eval_every", "eval_bytes", "sample"}  # of a recipe: they change no number of a step


class Progress(NamedTuple):
    """Where a run keeps its states, how often it saves them, and the one that it goes on with."""

    directory: Path
    every: int  # 0: nothing is saved
    keep: int
    newest: Path | None
    step: int  # that it goes on after


class Saved:
    """The states of a run under way."""

    def __init__(self, checkpoints: Checkpoints, progress: Progress) -> None:
        self.checkpoints, self.progress = checkpoints, progress

    def start(self, first: Callable[[], State]) -> State:
        """The state to go on with, or the first."""
        found = None
        if self.progress.newest:
            try:
                found = self.checkpoints.restore()
            except ValueError as error:
                raise CannotStart(error) from error
        return first() if found is None else found

    def keep(self, state: State, last: bool) -> None:
        """Save if it is time to, and the last state in any case."""
        if last:
            self.now(state)
        elif self.progress.every:
            self.checkpoints(state)

    def now(self, state: State) -> Path | None:
        """Save in any case, unless nothing is to be saved; where."""
        if not self.progress.every:
            return None
        self.checkpoints.save(state)
        self.checkpoints.wait()
        return self.checkpoints.latest


@contextmanager
def saving(
    progress: Progress, recipe: Recipe, corpus: Corpus, plan: Plan, comm: Comm
) -> Iterator[Saved]:
    """The states of a run; earlier ones that it does not go on with are removed."""
    check_agreement(f"{progress.newest} of step {progress.step}", "state to go on with", comm)
    if progress.newest is None:
        together(lambda: _forget(progress.directory) if comm.rank == 0 else None, comm)
    every, identity = max(1, progress.every), _identity(recipe, corpus)
    with Checkpoints(
        progress.directory, plan, comm, keep=progress.keep, every=every, metadata=identity
    ) as checkpoints:
        yield Saved(checkpoints, progress)


def find_progress(
    directory: Path, recipe: Recipe, corpus: Corpus, *, every: int, keep: int, restart: bool
) -> Progress:
    """What a run of this recipe and text has left in a directory.

    Raises:
        ValueError: it is of another recipe or text, or damaged; numbers out of range.
    """
    if every < 0 or keep < 1:
        raise ValueError(f"--save-every {every} --keep {keep}: at least 0 and 1")
    paths = [] if restart else committed(directory)
    if not paths:
        return Progress(directory, every, keep, None, 0)
    contents = describe(paths[-1])
    _refuse_another(contents.metadata, recipe, corpus, directory)
    return Progress(directory, every, keep, paths[-1], contents.step)


def _identity(recipe: Recipe, corpus: Corpus) -> dict[str, str]:
    return {"recipe": config.dumps(recipe), "corpus": fingerprint(corpus)}


def _refuse_another(found: Any, recipe: Recipe, corpus: Corpus, directory: Path) -> None:
    mine = _identity(recipe, corpus)
    if found == mine:
        return
    cure = "give another --out, or --restart to begin anew"
    if not isinstance(found, dict) or set(found) != set(mine):
        raise ValueError(f"{directory} has states that no run of this command has saved: {cure}")
    if found["corpus"] != mine["corpus"]:
        raise ValueError(f"{directory} has states of a run on another text: {cure}")
    was, now = (_flat(tomllib.loads(text["recipe"])) for text in (found, mine))
    changed = [
        f"{key} = {was.get(key)} then, {now.get(key)} now"
        for key in sorted({*was, *now} - ONLY_SEEN)
        if was.get(key) != now.get(key)
    ]
    if not changed:
        return
    raise ValueError(f"{directory} has states of another recipe ({'; '.join(changed)}): {cure}")


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _forget(directory: Path) -> None:
    for path in committed(directory):
        discard(path, DISK)
