"""The vote: a step is taken on every rank or on none, and it is known why not and on whose account.

What is voted on, what a veto leads to, and how it reads; how votes travel is :mod:`.poll`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Literal

from torch import Tensor


class Reason(IntFlag):
    """What a bit in ``metrics["veto"]`` stands for.

    >>> Reason(9)
    <Reason.LOSS|COPIES: 9>
    """

    LOSS = 1
    GRADIENT = 2
    ORDER = 4
    COPIES = 8
    STEP = 16
    POSITION = 32


WHY = {
    Reason.LOSS: "its sum of losses is not finite",
    Reason.GRADIENT: "its shards of the gradient, or their norm, are not finite",
    Reason.ORDER: "it started other collectives than the others, in another order or elsewhere in "
    "the program",
    Reason.COPIES: "its copies of parameters, moments or gradients are not those of the others",
    Reason.STEP: "its state is at another step than the others'",
    Reason.POSITION: "its batch is of another position in the data than the others'",
}


class Vetoed(RuntimeError):
    """A step was not taken, on any rank: ``metrics`` say why, as they would of a skipped step.

    >>> import torch
    >>> str(Vetoed({"veto": torch.tensor([0, 1])})).splitlines()[1]
    'rank 1: its sum of losses is not finite'
    """

    def __init__(self, metrics: Mapping[str, Tensor]) -> None:
        super().__init__(
            f"the step is not taken, on any rank:\n{why(metrics)}\nThe state is as it was. Take "
            "the step again, go on without the batch (Vote('skip')), or restore a checkpoint: "
            "copies that have parted stay so"
        )
        self.metrics = metrics


@dataclass(frozen=True)
class Vote:
    """``make_train_step(..., commit=Vote())``: a step that commits on all ranks or on none.

    A step is not taken if on any rank the sum of losses or the gradient is not finite, if ranks
    started different collectives, or in another order, if copies of a shard (parameters, moments,
    gradients) differ in a bit, or if ranks are at different steps. Where the ranks disagree, those
    that differ from most of the others are named; of two, the second.

    What each rank counts are the same numbers, so the decision is the same everywhere. Two
    collectives that the same line starts on tensors of the same shapes are alike to the vote; their
    exchange is seen by what it does to copies. Ranks must start a collective from the same line.

    Args:
        on_veto: ``"raise"`` :class:`Vetoed` on every rank; the old state can still be used, also a
            donated one. ``"skip"`` the batch: parameters and moments stay, bit for bit, and the
            step counts on, so that a position in the data that is a function of the step moves on
            and schedules keep their time. ``metrics["committed"]`` is false then, and
            ``metrics["veto"]`` holds each rank's reasons; :func:`vetoes_in_a_row` sets a limit.
        position: ``position(batch)``, an integer that has to be the same on every rank, for data
            whose position is no function of the step.

    >>> Vote("skip")
    Vote(on_veto='skip', position=None)
    """

    on_veto: Literal["raise", "skip"] = "raise"
    position: Callable[[Any], int | Tensor] | None = None

    def __post_init__(self) -> None:
        if self.on_veto not in ("raise", "skip"):
            raise ValueError(f"Vote(on_veto={self.on_veto!r}): 'raise' or 'skip'")


def as_vote(commit: Literal["vote"] | Vote | None) -> Vote | None:
    """What ``commit=`` stands for.

    Raises:
        ValueError: anything else.
    """
    if commit is None or isinstance(commit, Vote):
        return commit
    if commit == "vote":
        return Vote()
    raise ValueError(f"commit={commit!r}: 'vote', a Vote, or None for a step that is always taken")


def why(metrics: Mapping[str, Tensor]) -> str:
    """Why a step was not taken and on whose account, a line for each rank; nothing if it was.

    >>> import torch
    >>> print(why({"veto": torch.tensor([0, 1, 0, 8])}))
    rank 1: its sum of losses is not finite
    rank 3: its copies of parameters, moments or gradients are not those of the others
    """
    return "\n".join(
        f"rank {rank}: " + "; ".join(WHY[reason] for reason in Reason if bits & reason)
        for rank, bits in enumerate(_voted(metrics)["veto"].tolist())
        if bits
    )


def vetoes_in_a_row(metrics: Mapping[str, Tensor], before: int = 0, most: int = 0) -> int:
    """``0 if committed else before + 1``, and an error once these are more than ``most``.

    The same on every rank. ``vetoes = vetoes_in_a_row(metrics, vetoes, most=3)`` after each step.

    Raises:
        Vetoed: more vetoes in a row than ``most``.

    >>> import torch
    >>> vetoed = {"committed": torch.tensor(False), "veto": torch.tensor([1])}
    >>> vetoes_in_a_row(vetoed, 2, most=3)
    3
    """
    vetoes = 0 if bool(_voted(metrics)["committed"]) else before + 1
    if vetoes > most:
        error = Vetoed(metrics)
        error.add_note(f"{vetoes} steps in a row were not taken, more than most={most}")
        raise error
    return vetoes


def _voted(metrics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if "veto" not in metrics:
        raise ValueError(
            f"these metrics are of a step without a vote, they have {sorted(metrics)}: "
            "make_train_step(..., commit='vote')"
        )
    return metrics
