"""Replay: a recorded rank runs its step again, alone in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from functional_ep.recordings.file import About, digests, read_about, read_tensors, to_heard
from functional_ep.recordings.record import Metrics, Step, digests_of
from functional_ep.recordings.trees import rebuild, shown
from functional_ep.state import State
from sharding import Comm, Divergence
from sharding.streams import standing
from sharding.tape import Replayed


def replay(path: str | Path, program: Callable[[Comm], Step]) -> tuple[State, Metrics]:
    """``step(state, *batches)`` of a recorded rank again, bit for bit, with nobody else there.

    Args:
        path: a recording, as ``"run/rank-00003/step-00000100"``; see :func:`record`.
        program: what makes the step: called with that rank of that mesh, whose collectives are
            answered from the recording. It needs no state: that comes from there too.

    Returns:
        State and metrics after the step, the recorded ones to the bit.

    Raises:
        ValueError: no recording, one of a newer version, or a damaged one.
        Divergence: the program asks for another collective than it did, sends other numbers or
            comes to others; the message says where that begins.
        Exception: what the recorded step raised, if it did and the program still does.

    >>> replay("elsewhere", lambda comm: None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: elsewhere is no recording: ...
    """
    folder = Path(path)
    about = read_about(folder)
    tensors = read_tensors(folder, about)
    heard = [to_heard(entry, tensors) for entry in about.collectives]
    comm = Replayed(about.mesh, about.rank, heard, digests)
    if torch.cuda.is_available():
        comm.device = torch.device(about.device)
    before = {name: rebuild(node, tensors) for name, node in about.before.items()}
    step = program(comm)
    comm.play()
    with standing(before["random"]), _threads(about.threads):
        state, metrics = step(before["state"], *before["batches"])
    comm.check_end()
    _check(about, digests_of(state, metrics), comm.other)
    return state, metrics


def _check(about: About, found: dict[str, str], other: list[str]) -> None:
    """Refuse numbers that are not the recorded ones."""
    where = f"rank {about.rank}, step {about.step}"
    if about.ended:
        raise Divergence(f"{where}: in the recording it ended with {about.ended}. Here it did not")
    if found.keys() != about.result.keys():
        only = sorted(found.keys() ^ about.result.keys())
        raise Divergence(f"{where}: {only} are in one result only: it is not the same program")
    wrong = [shown(leaf) for leaf in found if found[leaf] != about.result[leaf]]
    said = [f"{other[0]}, is sent other numbers than it was"] if other else []
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        said.append(f"{', '.join(wrong[:5])}{more} differ from the recorded ones")
    if said:
        raise Divergence(
            f"{where}: {'; '.join(said)}. The program, the kind of machine or the version of a "
            "library is another"
        )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Sums are split over threads: as many as there were give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
