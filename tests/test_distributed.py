"""Real ranks: what is refused before they start, and ranks that part ways or go away."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
from farm import Farm
from torch import Tensor

from sharding import Comm, Divergence, Mesh, distributed
from sharding.buffers import SMALL, Buffers
from sharding.comm import Op
from sharding.distributed import VARIABLES

MESH = Mesh(ep=2)
PATIENCE = 3.0


# -- before they start ---------------------------------------------------------------------------


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_missing_variables_are_named_with_the_command_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched(monkeypatch, RANK="0", WORLD_SIZE="2")
    message = r"MASTER_ADDR, MASTER_PORT not set.*torchrun --nproc-per-node 2.*simulate\(program"
    with pytest.raises(RuntimeError, match=message), distributed(MESH):
        pass


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "cpu:0", torch.device("cuda", 0)])
def test_another_device_is_refused_before_anyone_joins(
    device: str | torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "",
        "MASTER_PORT": "",
    }.items():
        monkeypatch.setenv(name, value)
    message = r"distributed\(\.\.\., device='.*'\): 'cpu' or 'cuda'"
    with pytest.raises(ValueError, match=message), distributed(Mesh(ep=1), device=device):
        pass


def test_a_mesh_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    message = r"Mesh\(edp=2, ep=4\) has 8 ranks, but 3 processes .*torchrun --nproc-per-node 8"
    with pytest.raises(ValueError, match=message), distributed(Mesh(edp=2, ep=4)):
        pass


def enter_other_meshes(comm: Comm) -> list[str]:
    """Inside a process group: meshes of its size use it, others are refused."""
    found: list[str] = []
    for mesh in (Mesh(edp=1, ep=2), Mesh(a=2, b=1), Mesh(ep=4)):
        try:
            with distributed(mesh) as inner:
                found.append(str(inner.all_reduce([torch.ones(1)], mesh.axes)[0].item()))
        except ValueError as error:
            found.append(str(error).split(":")[0])
    return [*found, str(comm.all_reduce([torch.ones(1)], ("ep",))[0].item())]


def test_an_existing_process_group_is_used_and_left(ranks2: Farm) -> None:
    refusal = "Mesh(ep=4) has 4 ranks, but 2 processes were started"
    assert ranks2.run(enter_other_meshes, MESH) == [["2.0", "2.0", refusal, "2.0"]] * 2


def enter_on_cuda(comm: Comm) -> str:
    try:
        with distributed(MESH, device="cuda"):
            return "entered"
    except ValueError as error:
        return str(error)


def test_a_process_group_of_another_backend_is_refused(ranks2: Farm) -> None:
    for found in ranks2.run(enter_on_cuda, MESH):
        assert found.startswith("distributed(..., device='cuda') in a process group of gloo: that")


# -- ranks that part ways ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient() -> Iterator[Farm]:
    """Two processes that wait for each other for three seconds."""
    with Farm(2, PATIENCE) as farm:
        yield farm


def skip(comm: Comm, rank: int) -> None:
    comm.all_gather([torch.ones(3)], ("ep",))
    if comm.rank != rank:
        comm.all_reduce([torch.ones(5)], ("ep",))
    else:
        time.sleep(2 * PATIENCE)  # a rank that is busy, or lost, elsewhere


def leave(comm: Comm, rank: int) -> None:
    comm.all_gather([torch.ones(3)], ("ep",))
    if comm.rank == rank:
        os._exit(0)
    comm.all_reduce([torch.ones(5)], ("ep",))


def check_divergence(error: BaseException, rank: int, why: str) -> None:
    message = str(error)
    other = 1 - rank
    at = "is at its collective no. 2, all_reduce(axes=('ep',)) of [float32[5]]"
    assert f"rank {other} {{'ep': {other}}} {at}" in message
    assert f"rank {rank} {{'ep': {rank}}} {why}" in message


def test_a_rank_that_skips_a_collective_is_named(impatient: Farm) -> None:
    with pytest.raises(Divergence) as caught:
        impatient.run(skip, MESH, [0] * 2)
    check_divergence(caught.value, 0, "did not join it within 3 s")


def gather_others(comm: Comm, name: str) -> None:
    comm.start(Op("all_gather", ("ep",), of=name), [torch.ones(3)]).wait()


@pytest.mark.parametrize("prefix", ["", "a" * 5000, "\n'", "\udcff"])
def test_ranks_that_gather_different_blocks_of_one_shape_are_named(
    impatient: Farm, prefix: str
) -> None:
    names = [f"{prefix}{rank}/w" for rank in range(2)]
    with pytest.raises(Divergence, match="has sent something else") as caught:
        impatient.run(gather_others, MESH, names)
    assert len(prefix) > 9 or any(
        f"all_gather(axes=('ep',), of={name!r}) of [float32[3]], " in str(caught.value)
        for name in names
    )
    impatient.run(gather_others, MESH, [names[0]] * 2)


def test_a_rank_that_has_gone_is_named(impatient: Farm) -> None:
    with pytest.raises(RuntimeError) as caught:  # whichever of the two is heard of first
        impatient.run(leave, MESH, [1] * 2)
    if isinstance(caught.value, Divergence):
        check_divergence(caught.value, 1, "has gone")
    else:
        assert "rank 1 died" in str(caught.value)


# -- buffers -------------------------------------------------------------------------------------

ENTRIES = SMALL // 4  # a float32 tensor of so many is pooled when gathered or reduced


def hold_results(comm: Comm) -> list[bool]:
    """Results that are held, or looked at through a view, while others come and go."""
    rounds = range(6)
    held: list[Tensor] = []
    for i in rounds:
        x = torch.full((ENTRIES,), float(i + 1))
        (gathered,) = comm.all_gather([x], ("ep",))
        (part,) = comm.reduce_scatter([torch.cat([x, x])], ("ep",))
        held += [gathered, part] if i % 2 else [gathered[5:7], part.view(-1, 2)[0]]
    expected = [value for i in rounds for value in (i + 1.0, 2 * (i + 1.0))]
    return [bool((x == value).all()) for x, value in zip(held, expected, strict=True)]


def let_results_go(comm: Comm) -> int:
    """The number of places at which results lie, none of which is held."""
    x = torch.ones(ENTRIES)
    return len({comm.all_gather([x], ("ep",))[0].data_ptr() for _ in range(8)})


def start_several(comm: Comm) -> list[float]:
    """Transfers in flight at a time, the first of which is awaited last."""
    xs = [torch.full((ENTRIES,), float(i)) for i in range(4)]
    works = [comm.start(Op("all_gather", ("ep",)), [x]) for x in xs]
    results = [work.wait()[0] for work in works[::-1]]
    return [value for y in results for value in (y.min().item(), y.max().item())]


def test_a_result_that_is_held_is_never_overwritten(ranks2: Farm) -> None:
    assert ranks2.run(hold_results, MESH) == [[True] * 12] * 2


def test_buffers_are_used_again_once_nobody_holds_them(ranks2: Farm) -> None:
    assert ranks2.run(let_results_go, MESH) == [1, 1]


def test_transfers_in_flight_have_buffers_of_their_own(ranks2: Farm) -> None:
    assert ranks2.run(start_several, MESH) == [[3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0]] * 2


def test_a_pool_that_forgets_who_holds_a_result_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kept() -> bool:
        buffers, like = Buffers(), torch.empty(0)
        first = buffers.take((ENTRIES,), like).fill_(1.0)
        view = first[3:4]
        del first
        buffers.take((ENTRIES,), like).fill_(2.0)
        return view.item() == 1.0

    assert kept()
    monkeypatch.setattr("sharding.buffers._references", lambda storage: 1)
    assert not kept()
