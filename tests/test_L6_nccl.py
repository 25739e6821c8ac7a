"""L6 for what is launched on NCCL: the same calls of torch, answered by gloo.

What it launches, on which group, in which order of ranks, and what it makes of the results is the
program that runs on GPUs; NCCL itself is not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from budget import real
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from test_L6_backends import (
    Call,
    Tensors,
    calls,
    everywhere,
    factorisations,
    program,
    specification,
)
from torch import Tensor

from sharding import Comm, Mesh
from sharding.distributed import nccl
from sharding.distributed.nccl import NcclComm

MADE: dict[Mesh, NcclComm] = {}  # on a rank: its groups are made once
# Three additions in one order and three in another, each off by half of the last digit of 1,600.
ATOL = {torch.float64: 6.9e-13, torch.float32: 3.7e-4, torch.bfloat16: 24.0}


def by_nccl(
    comm: Comm, in_flight: Sequence[Call], backwards: bool, unsorted: bool = False
) -> list[list[Tensor]]:
    if comm.mesh not in MADE:
        cpu = torch.device("cpu")
        MADE[comm.mesh] = NcclComm(comm.mesh, comm.rank, 10.0, cpu)
    with pytest.MonkeyPatch.context() as patch:
        if unsorted:
            patch.setattr(nccl, "_permute", lambda x, n, order: x)
        return program(MADE[comm.mesh], in_flight, backwards)


def check_close(in_flight: Sequence[Call], mesh: Mesh, found: list[list[list[Tensor]]]) -> None:
    """Sums are in no order that is ours."""
    for rank, results in enumerate(found):
        for call, ys in zip(in_flight, results, strict=True):
            for y, expected in zip(ys, specification(call, mesh, rank), strict=True):
                summed = call.kind in ("all_reduce", "reduce_scatter")
                atol = ATOL.get(y.dtype, 0.0) if summed else 0.0
                torch.testing.assert_close(y, expected, rtol=0, atol=atol)


@real(2)
@given(data=st.data())
@pytest.mark.parametrize("size", [2, 4])
def test_what_is_launched_follows_the_specification(
    size: int, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    farm: Farm = request.getfixturevalue(f"ranks{size}")
    mesh = data.draw(factorisations(size))
    in_flight = data.draw(st.lists(calls(mesh), min_size=1, max_size=3))
    arguments = everywhere(mesh, in_flight, data.draw(st.booleans()))
    check_close(in_flight, mesh, farm.run(by_nccl, mesh, *arguments))


def arranged(comm: Comm, call: Call) -> list[Tensor]:
    """Of the same ranks on another mesh, whose groups are made when it is."""
    once = NcclComm(comm.mesh, comm.rank, 10.0, torch.device("cpu"))
    made = len(once.groups)
    other = once.on(Mesh(edp=2, ep=2))
    assert len(other.groups) == made + 4
    there, again = dict(other.groups), other.on(comm.mesh).groups
    assert again.keys() == there.keys() and all(again[k] is there[k] for k in there)
    once.late.close()
    return other.start(call.op(other.mesh, comm.rank), call.sent(comm.rank)).wait()


def test_ranks_in_another_arrangement(ranks4: Farm) -> None:
    for axes in (("ep",), ("edp",), ("ep", "edp")):
        call = Call("all_gather", axes, (Tensors((2,), torch.float32),))
        found = ranks4.run(arranged, Mesh(ep=4), [call] * 4)
        check_close([call], Mesh(edp=2, ep=2), [[ys] for ys in found])


def test_ranks_in_the_order_of_their_numbers_are_rejected(ranks4: Farm) -> None:
    mesh = Mesh(edp=2, ep=2)
    for kind in ("all_gather", "reduce_scatter"):
        call = Call(kind, ("ep", "edp"), (Tensors((4,), torch.float32),))
        with pytest.raises(AssertionError):
            check_close(
                [call],
                mesh,
                ranks4.run(by_nccl, mesh, *everywhere(mesh, [call], False), [True] * 4),
            )
