"""Checkpoints of a training: written behind it, the newest few kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Self

import torch

from functional_ep.agreement import gather_bytes, together
from functional_ep.checkpoint.check import is_whole
from functional_ep.checkpoint.disk import DISK, Disk, make_directories
from functional_ep.checkpoint.folder import claimed, committed, discard, step_of, tidy
from functional_ep.checkpoint.parts import Buffers, on_cpu
from functional_ep.checkpoint.restoring import restore
from functional_ep.checkpoint.saving import Content, Extras, Saving
from functional_ep.sealed import Damaged
from functional_ep.state import State
from sharding import Comm, Plan


class Cost(NamedTuple):
    """What a save has cost this rank: seconds that training stood, and that writing took."""

    step: int
    stalled: float
    writing: float
    bytes: int


class Checkpoints:
    """``checkpoints(state)`` after every step: saves every so many, keeps the newest few.

    Training goes on while a save is written: a rank copies what it is to write, to memory that is
    kept for it, and a thread writes that. Once all ranks have written, the next call commits: a
    save that is under way is no checkpoint yet. The next save waits for it. What goes wrong, on
    whatever rank and thread, is raised on all ranks by the next call, and loses nothing that was
    committed. Files that have not changed, such as those of frozen leaves, are linked, not written.

    Args:
        directory: of checkpoints ``step-00000100``, each complete by itself.
        plan: of the states.
        comm: the ranks; all make the same calls.
        keep: how many of the newest stay; None keeps all.
        every: steps between saves.
        background: write in a thread; False writes at once.
        metadata: see :func:`functional_ep.save`.
        files: see :func:`functional_ep.save`.
        disk: the operations on files.

    Raises:
        ValueError: ``keep`` or ``every`` less than one; from a call, a directory that has
            checkpoints of later steps, from a training that went another way.
        BlockingIOError: from a call, another process is saving to the directory.

    >>> from tempfile import TemporaryDirectory
    >>> from sharding import Mesh, make_plan, simulate, zero3
    >>> from functional_ep import init_state, sgd
    >>> params = {"w": torch.ones(3)}
    >>> plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> def program(comm, directory):
    ...     state = init_state(plan.shard(params, comm), plan, sgd(0.1))
    ...     with Checkpoints(directory, plan, comm, every=2, keep=1) as checkpoints:
    ...         for _ in range(5):
    ...             state = state._replace(step=state.step + 1)  # a train step
    ...             checkpoints(state)
    ...     return checkpoints.latest.name, checkpoints.restore().step
    >>> with TemporaryDirectory() as directory:
    ...     simulate(program, plan.mesh, [directory] * 2)[0]
    ('step-00000004', tensor(4))
    """

    def __init__(
        self,
        directory: str | Path,
        plan: Plan,
        comm: Comm,
        *,
        keep: int | None = 3,
        every: int = 100,
        background: bool = True,
        metadata: Any = None,
        files: Mapping[str, Content] | None = None,
        disk: Disk = DISK,
    ) -> None:
        if every < 1 or (keep is not None and keep < 1):
            raise ValueError(f"every={every}, keep={keep}: at least 1 each; keep=None keeps all")
        self.directory, self.plan, self.comm, self.disk = Path(directory), plan, comm, disk
        self.keep, self.every, self.background = keep, every, background
        self.extras = Extras(metadata, files or {})
        self.last: Cost | None = None
        self._buffers = Buffers()
        self._pending: _Pending | None = None
        self._held = ExitStack()  # while a save is under way, rank 0 holds the directory
        self._called = False

    def __call__(self, state: State) -> None:
        """Save if it is time to; commit what has been written meanwhile."""
        step = int(state.step)
        if not self._called:
            self._called = True
            self._lead(lambda: self._refuse_later(step))
        if self._pending is not None and self._all(self._pending.is_done):
            self.wait()
        if step and step % self.every == 0:
            self.save(state)

    def save(self, state: State) -> None:
        """Save now, whatever the step; with ``background``, return when the state is copied."""
        self.wait()
        try:
            self._pending = self._begun(state)
        except BaseException:
            self._held.close()
            raise
        if not self.background:
            self.wait()

    def _begun(self, state: State) -> _Pending:
        started = perf_counter()
        step = int(state.step)
        path = self.directory / f"step-{step:08}"
        self._lead(lambda: self._refuse_later(step))
        self._lead(self._hold)
        self._lead(lambda: tidy(self.directory, self.disk))
        earlier = [other for other in committed(self.directory, self.disk) if other != path]
        copies = self._buffers.copies if self.background else on_cpu
        rest = self.plan, self.comm
        saving = Saving(path, state, *rest, extras=self.extras, copies=copies, disk=self.disk)
        return _Pending(saving, earlier[-1] if earlier else None, self.background, started)

    def wait(self) -> None:
        """Until the save that is under way is committed, if there is one."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        started = perf_counter()
        with self._held:
            pending.join()
            pending.saving.commit()
            self._lead(self._retain)
        self.last = pending.cost(perf_counter() - started)

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint that is committed."""
        paths = committed(self.directory, self.disk)
        return paths[-1] if paths else None

    def restore(self, *, verify: bool = True, cast: bool = False) -> State | None:
        """The state of the newest checkpoint, or None if there is none yet.

        Raises:
            ValueError, OSError: as :func:`functional_ep.restore`. It never turns to an older
                checkpoint by itself, but where the newest is damaged says which one is in order.
        """
        newest = str(self.latest or "").encode()
        path = Path(gather_bytes(newest, self.comm)[0].decode())
        if path == Path():
            return None
        try:
            return restore(path, self.plan, self.comm, verify=verify, cast=cast, disk=self.disk)
        except Damaged as error:
            raise Damaged(f"{error}{self._advice(path)}") from error

    def _advice(self, newest: Path) -> str:
        """The newest of the others of which every byte is in order; each rank reads a part."""
        older = together(lambda: committed(self.directory, self.disk), self.comm)
        names = "/".join(path.name for path in reversed(older) if path != newest).encode()
        share, damaged = slice(self.comm.rank, None, self.comm.mesh.size), newest.name
        for name in filter(None, gather_bytes(names, self.comm)[0].decode().split("/")):
            good = self.directory / name
            if self._all(is_whole(good, share, self.disk)):
                return f": {good} is in order, move {damaged} away to go on from it"
            damaged = f"{name}, {damaged}"
        return ", but none that is older is in order"

    def _refuse_later(self, step: int) -> None:
        """The newest checkpoint is that of the highest step, so there must be no other future."""
        latest = self.latest
        if latest is not None and step_of(latest) > step:
            raise ValueError(
                f"{latest} is there, but training is at step {step}, so {latest.name} is not what "
                "it will come to: move later ones away, or save to another directory"
            )

    def _all(self, here: bool) -> bool:
        """Whether it is so on all ranks."""
        (count,) = self.comm.all_reduce(
            [torch.tensor([int(here)], device=self.comm.device)], self.comm.mesh.axes
        )
        return int(count) == self.comm.mesh.size

    def _lead(self, action: Callable[[], None]) -> None:
        together(action if self.comm.rank == 0 else lambda: None, self.comm)

    def _hold(self) -> None:
        make_directories(self.directory, self.disk)
        self._held.enter_context(claimed(self.directory, self.disk))

    def _retain(self) -> None:
        paths = committed(self.directory, self.disk)
        for path in paths[: -self.keep] if self.keep else ():
            with suppress(BlockingIOError):  # somebody saves to it: it is no longer ours
                discard(path, self.disk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Commit what is under way; after an error, which other ranks may not have, leave it."""
        if kind is None:
            self.wait()
        elif self._pending is not None:
            self._pending.join()
            self._pending.saving.held.close()
            self._held.close()


class _Pending:
    """A save that is being written."""

    def __init__(self, saving: Saving, earlier: Path | None, thread: bool, started: float) -> None:
        self.saving, self.earlier, self.writing = saving, earlier, 0.0
        self.thread = threading.Thread(target=self._write, name=f"save of step {saving.step}")
        self.thread.start() if thread else self._write()
        self.stalled = perf_counter() - started

    def _write(self) -> None:
        started = perf_counter()
        self.saving.write(self.earlier)
        self.writing = perf_counter() - started

    @property
    def is_done(self) -> bool:
        return not self.thread.is_alive()

    def join(self) -> None:
        if self.thread.ident is not None:
            self.thread.join()

    def cost(self, waited: float) -> Cost:
        size = sum(part.x.numel() * part.x.element_size() for part in self.saving.parts)
        return Cost(self.saving.step, self.stalled + waited, self.writing, size)
