"""The farm of real ranks: results, errors, and processes that are replaced after a failure."""

from __future__ import annotations

import os

import pytest
import torch
from farm import Farm, RankDied
from torch import Tensor

from sharding import Comm, Mesh

MESH = Mesh(ep=2)


def add(comm: Comm, x: Tensor) -> tuple[int, Tensor]:
    return os.getpid(), comm.all_reduce([x], ("ep",))[0]


def raise_on(comm: Comm, rank: int) -> None:
    if comm.rank == rank:
        raise KeyError("unheard of")
    comm.all_reduce([torch.ones(2)], ("ep",))


def die(comm: Comm) -> None:
    if comm.rank == 1:
        os._exit(3)


def test_processes_stay_and_answer_rank_by_rank(ranks2: Farm) -> None:
    numbers = torch.tensor([[1.0], [2.0]])
    first, second = ranks2.run(add, MESH, numbers), ranks2.run(add, MESH, numbers)
    assert [x.item() for _, x in first] == [3.0, 3.0]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({os.getpid(), *(pid for pid, _ in first)}) == 3


def test_an_error_names_its_rank_and_line_and_the_farm_goes_on(ranks2: Farm) -> None:
    with pytest.raises(KeyError, match="unheard of") as caught:
        ranks2.run(raise_on, MESH, [1, 1])
    (note,) = caught.value.__notes__
    assert f"real rank 1 of {MESH}" in note and "in raise_on" in note
    assert ranks2.run(add, MESH, torch.ones(2, 1))[0][1] == 2


def test_a_dead_process_is_reported_and_replaced(ranks2: Farm) -> None:
    with pytest.raises(RankDied, match="rank 1 died during test_farm:die, exit code 3"):
        ranks2.run(die, MESH)
    assert ranks2.run(add, MESH, torch.ones(2, 1))[0][1] == 2
