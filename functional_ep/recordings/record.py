"""Record: a step that writes down what its rank was given and what it received."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_ep.recordings.file import (
    About,
    check_dtypes,
    digests,
    folder_of,
    of_heard,
    write,
)
from functional_ep.recordings.trees import Json, describe
from functional_ep.state import State
from sharding import Comm
from sharding.streams import stand
from sharding.tape import Heard, Replayed, Tape
from sharding.tree import flatten, path_strings

Metrics = dict[str, Tensor]
Step = Callable[..., tuple[State, Metrics]]


def record(
    step: Step, comm: Comm, directory: str | Path, steps: Container[int] | None = None
) -> Step:
    """``record(step)(state, batch) = step(state, batch)``, bit for bit, and a recording of it.

    ``directory/rank-00003/step-00000100`` then holds what rank 3 had and received in step 100: its
    state before, its batches, its random stream, and the results of every collective. That is all
    that :func:`replay` needs, alone and elsewhere. A recording of the same step before it is
    replaced. A step that ends with an error, or is interrupted, is recorded as far as it came. What
    cannot be written is warned of: a step that was taken is not lost for it.

    Until the step ends, the results of its collectives are kept in memory.

    Args:
        step: from ``make_train_step(..., comm)``.
        comm: the ranks: the same object with which step and loss were made.
        directory: for all ranks and steps, each of which has a folder in it.
        steps: which steps to record, as ``range(100, 110)``; all by default.

    Raises:
        OSError: a directory that cannot be made.
        ValueError: from the step, for a batch that JSON and tensors cannot describe, or under a
            transform.

    >>> import tempfile
    >>> from sharding import Mesh, make_plan, sharded, simulate, zero3
    >>> from functional_ep import init_state, make_train_step, replay, sgd
    >>> params, rules = {"w": torch.ones(2)}, {"dense": zero3("edp")}
    >>> plan = make_plan(params, {"w": "dense"}, rules, Mesh(edp=2))
    >>> def make(comm):
    ...     loss = sharded(lambda view, x: ((view["w"] * x).sum(), x.numel()), plan, comm)
    ...     return make_train_step(loss, plan, sgd(0.1), comm)
    >>> def program(comm, x, run):
    ...     step = record(make(comm), comm, run)
    ...     return step(init_state(plan.shard(params, comm), plan, sgd(0.1)), x)[0].params["w"]
    >>> with tempfile.TemporaryDirectory() as run:
    ...     xs = torch.ones(2), torch.zeros(2)
    ...     recorded = simulate(program, plan.mesh, xs, [run] * 2)[1]
    ...     state, metrics = replay(f"{run}/rank-00001/step-00000000", make)
    >>> torch.equal(state.params["w"], recorded)
    True
    """
    if isinstance(comm, Replayed):  # the program that was recorded may be what is replayed
        return step
    folder_of(directory, comm.rank, 0).parent.mkdir(parents=True, exist_ok=True)

    def recorded(state: State, *batches: Any) -> tuple[State, Metrics]:
        number = int(state.step) if state.step.numel() == 1 else None  # not of a donated state
        if number is None or (steps is not None and number not in steps):
            return step(state, *batches)
        if torch._C._are_functorch_transforms_active():
            raise ValueError("record under a transform: record the step outside of it")
        tensors: dict[str, Tensor] = {}
        before = _before(state, batches, tensors)
        tape = Tape(digests)

        def keep(**ended: Any) -> str:
            about = _about(comm, number, before, tape.heard, tensors)._replace(**ended)
            try:
                write(folder_of(directory, comm.rank, number), about, tensors)
            except (OSError, ValueError) as error:
                return f"there is no recording of step {number}: {error}"
            return ""

        try:
            with comm.heard_by(tape):
                after, metrics = step(state, *batches)
        except BaseException as error:  # an interrupt ends it too: it shall not look finished
            problem = keep(ended=f"{type(error).__name__}: {error}".removesuffix(": "))
            if problem:
                error.add_note(problem)
            raise
        problem = keep(result=digests_of(after, metrics))
        if problem:
            warnings.warn(problem, stacklevel=2)
        return after, metrics

    return recorded


def digests_of(state: State, metrics: Metrics) -> dict[str, str]:
    """The digest of every leaf that a step has returned, by its path."""
    tree = {"state": state, "metrics": metrics}
    return dict(zip(path_strings(tree), digests(flatten(tree)[0]), strict=True))


def _before(state: State, batches: tuple[Any, ...], tensors: dict[str, Tensor]) -> Json:
    """What a step is given. A copy of its tensors, which a donated step overwrites."""
    given: dict[str, Tensor] = {}
    before = {
        "state": describe(state, "state", given),
        "batches": describe(batches, "batches", given),
        "random": describe(stand(), "random", given),
    }
    check_dtypes(given)
    tensors.update((name, _copy(x)) for name, x in given.items())
    return before


def _copy(x: Tensor) -> Tensor:
    """With its strides, by which kernels are chosen; what is expanded stays so."""
    kept = x.detach()
    for dim in range(x.dim()):
        kept = kept.narrow(dim, 0, 1) if x.stride(dim) == 0 and x.shape[dim] else kept
    if _overlaps(kept):
        return kept.expand(x.shape).clone(memory_format=torch.contiguous_format)
    y = torch.empty_strided(kept.shape, x.stride(), dtype=x.dtype, device=x.device)
    return y.copy_(kept).expand(x.shape)


def _overlaps(x: Tensor) -> bool:
    """Whether two numbers may share memory, as in windows that slide."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * max(0, size - 1)
    return False


def _about(
    comm: Comm, number: int, before: Json, heard: list[Heard], tensors: dict[str, Tensor]
) -> About:
    collectives = [of_heard(i, each, tensors) for i, each in enumerate(heard)]
    device, threads = comm.device.type, torch.get_num_threads()
    return About(comm.mesh, comm.rank, number, device, threads, before, collectives, {}, {}, "")
