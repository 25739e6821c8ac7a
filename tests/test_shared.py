"""Links in shared memory: nothing is read too late, sent in vain or left behind."""

from __future__ import annotations

import os
import resource
import socket
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharding import Comm, Divergence, Mesh
from sharding.comm import Op
from sharding.distributed import segments
from sharding.distributed.pairwise import PairwiseComm
from sharding.distributed.parcel import Layout, Parcel
from sharding.distributed.segments import Outbox, Segment
from sharding.distributed.shared import INLINE, LARGE, SharedLink

MESH = Mesh(ep=2)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
SIZES = (0, 1, 3, INLINE // 4 - 1, INLINE // 4 + 1, LARGE // 4 + 1)


# -- parcels -------------------------------------------------------------------------------------


@given(data=st.data())
def test_what_is_laid_out_is_read_again(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6))
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in shapes]
    stream = torch.Generator().manual_seed(0)
    xs = [
        torch.randint(0, 9, shape, generator=stream).to(dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    parcel = Parcel(xs, b"")
    memory = torch.full((parcel.nbytes + 1,), 255, dtype=torch.uint8)
    parcel.write(memory)
    for x, y in zip(xs, Layout([torch.empty_like(x) for x in xs]).read(memory), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert memory[-1] == 255, "something was written behind the end"


# -- two links in one process --------------------------------------------------------------------


class Ends(NamedTuple):
    """Both ends of a connection."""

    left: SharedLink
    right: SharedLink

    def pass_on(self, xs: Sequence[Tensor]) -> list[Tensor]:
        self.left.send(Parcel(xs, b"x"))
        arrival = self.right.receive(xs, into=False, about=b"x")
        found = [x.clone() for x in arrival.wait()]
        arrival.release()
        return found


@pytest.fixture
def ends() -> Iterator[Ends]:
    sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    links = [SharedLink(1 - i, sockets[i], Outbox(), 2.0) for i in range(2)]
    yield Ends(*links)
    for link in links:
        link.close()
        link.outbox.close()


@pytest.mark.parametrize("entries", SIZES)
def test_a_parcel_arrives_and_its_memory_is_used_again(ends: Ends, entries: int) -> None:
    for i in range(20):
        x = torch.full((entries,), float(i))
        (found,) = ends.pass_on([x])
        assert torch.equal(found, x)
        ends.right.send(Parcel([], b"y"))  # some answer, as in every collective
        ends.left.receive([], into=False, about=b"y").wait()
    assert len(ends.left.outbox.segments) == (1 if 4 * entries > INLINE else 0)


def overtaken(ends: Ends) -> bool:
    """Whether a parcel that is still read is overwritten by those after it."""
    x = torch.zeros(INLINE)
    ends.left.send(Parcel([x], b"x"))
    arrival = ends.right.receive([x], into=False, about=b"x")
    (early,) = arrival.wait()
    for i in range(1, 4):
        ends.left.send(Parcel([x + i], b"x"))
        ends.right.receive([x], into=False, about=b"x").wait()
    return bool((early != 0).any())


def test_a_parcel_that_is_still_read_is_not_overwritten(ends: Ends) -> None:
    assert not overtaken(ends)


def test_an_outbox_that_forgets_its_readers_is_rejected(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(Segment):
        readers = property(lambda self: 0, lambda self, value: None)

    monkeypatch.setattr(segments, "Segment", Forgetful)
    assert overtaken(ends)


def test_an_unwanted_parcel_gives_its_memory_back(ends: Ends) -> None:
    x = torch.zeros(LARGE)
    ends.right.receive([x], into=False, about=b"x").release()  # before it has come
    ends.left.send(Parcel([x], b"x"))
    wanted = ends.right.receive([x], into=False, about=b"x")
    ends.left.send(Parcel([x + 1], b"x"))
    ends.right.receive([x], into=False, about=b"x").release()
    ends.left.send(Parcel([x + 2], b"x"))
    assert torch.equal(wanted.wait()[0], x + 1)
    wanted.release()
    last = ends.right.receive([x], into=False, about=b"x")
    ends.left.send(Parcel([x + 3], b"x"))
    assert torch.equal(last.wait()[0], x + 3)
    last.release()
    assert torch.equal(ends.pass_on([x])[0], x)
    assert len(ends.left.outbox.segments) == 3, "as many as were on their way at a time"
    assert not ends.right.notices and not ends.right.unwanted


def test_who_has_sent_all_may_leave_before_it_is_read(ends: Ends) -> None:
    x = torch.ones(LARGE)
    arrival = ends.right.receive([x], into=False, about=b"x")
    ends.left.send(Parcel([x], b"x"))
    ends.left.close()
    assert torch.equal(arrival.wait()[0], x)
    arrival.release()  # of a rank that has gone: nobody wants it back


def test_a_descriptor_that_cannot_be_received_is_an_error(ends: Ends) -> None:
    """And not the memory that lay under this number before."""
    ends.pass_on([torch.ones(INLINE)])
    ends.right.send(Parcel([], b"y"))
    ends.left.receive([], into=False, about=b"y").wait()
    x = torch.full((4 * INLINE,), 7.0)
    ends.left.send(Parcel([x], b"x"))  # the segment grows, and has another descriptor
    first_free = os.dup(0)
    os.close(first_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        with pytest.raises(OSError, match="too many files are open"):
            ends.right.receive([x], into=False, about=b"x").wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_rank_that_does_not_answer_is_given_up(ends: Ends) -> None:
    with pytest.raises(TimeoutError, match="no message for 2 s"):
        ends.right.receive([], into=False, about=b"").wait()
    with pytest.raises(TimeoutError, match="rank 1 reads no messages"):
        for _ in range(10_000):
            ends.left.send(Parcel([torch.zeros(INLINE // 4)], b""))
    ends.left.close()
    with pytest.raises(ConnectionError, match="its process has ended"):
        for _ in range(10_001):
            ends.right.receive([torch.zeros(INLINE // 4)], into=False, about=b"").wait()


# -- real ranks ----------------------------------------------------------------------------------


def run_ahead(comm: Comm, transfers: int, entries: int) -> list[float]:
    """Far more transfers than a socket holds notices of, all started before one is awaited."""
    xs = [torch.full((entries,), float(i + comm.rank)) for i in range(transfers)]
    works = [comm.start(Op("all_reduce", ("ep",)), [x]) for x in xs]
    found = [float(work.wait()[0].sum()) / entries for work in works]
    # All segments that the other has read are given back at once.
    comm.all_reduce([torch.ones(INLINE // 4)], ("ep",))
    return found


@pytest.mark.parametrize("entries", [INLINE // 4, INLINE // 4 + 1])
def test_ranks_may_run_far_ahead(ranks2: Farm, entries: int) -> None:
    expected = [2.0 * i + 1 for i in range(800)]
    assert ranks2.run(run_ahead, MESH, [800] * 2, [entries] * 2) == [expected] * 2


def run_ahead_in_a_ring(comm: Comm) -> bool:
    """Each rank begins with its neighbour, so that each would wait for one that waits for it."""
    op = Op("all_gather", ("ep",))
    works = [comm.start(op, [torch.full((INLINE // 4,), float(i))]) for i in range(100)]
    return all(bool((work.wait()[0] == i).all()) for i, work in enumerate(works))


def test_more_than_two_may_run_far_ahead_as_well(ranks4: Farm) -> None:
    assert ranks4.run(run_ahead_in_a_ring, Mesh(ep=4)) == [True] * 4


def abandon(comm: Comm) -> int:
    """Segments after many transfers that nobody asked the result of."""
    assert isinstance(comm, PairwiseComm)
    before = len(comm.outbox.segments)
    for _ in range(50):
        comm.start(Op("all_gather", ("ep",)), [torch.zeros(LARGE)])
        comm.all_reduce([torch.zeros(1)], ("ep",))
    return len(comm.outbox.segments) - before


def test_transfers_that_nobody_awaits_keep_no_memory(ranks2: Farm) -> None:
    assert max(ranks2.run(abandon, MESH)) <= 3


def descriptors(comm: Comm) -> int:
    """Open files after transfers of many sizes."""
    for entries in range(INLINE, 20 * INLINE, INLINE // 7):
        comm.all_gather([torch.zeros(entries)], ("ep",))
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_do_not_add_up(ranks2: Farm) -> None:
    first = ranks2.run(descriptors, MESH)
    assert ranks2.run(descriptors, MESH) == first


def fork(comm: Comm) -> tuple[bool, float]:
    """Whether a forked child lets go of the sockets, and a sum in which its parent takes part."""
    assert isinstance(comm, PairwiseComm)
    links = [link for link in comm.links.values() if isinstance(link, SharedLink)]
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads; the child only writes
        child = os.fork()
    if not child:
        os.write(theirs, bytes([all(link.socket.fileno() < 0 for link in links)]))
        os._exit(0)
    os.waitpid(child, 0)
    answer = os.read(ours, 1)
    os.close(ours)
    os.close(theirs)
    return bool(links) and answer == b"\x01", float(comm.all_reduce([torch.ones(1)], ("ep",))[0])


def test_a_forked_child_does_not_hold_a_dead_rank_open(ranks2: Farm) -> None:
    assert ranks2.run(fork, MESH) == [(True, 2.0)] * 2


def part_ways(comm: Comm, kinds: Sequence[str]) -> None:
    if kinds[comm.rank] == "reduce":
        comm.all_reduce([torch.ones(4)], ("ep",))
    elif kinds[comm.rank] == "gather":
        comm.all_gather([torch.ones(4)], ("ep",))
    elif kinds[comm.rank] == "reshaped":
        comm.all_reduce([torch.ones(2, 2)], ("ep",))
    else:
        rows = (2, 2) if kinds[comm.rank] == "even" else (1, 3)
        comm.all_to_all([torch.ones(4)], ("ep",), rows, rows)


@pytest.mark.parametrize(
    ("kinds", "what"),
    [
        (
            ("reduce", "gather"),
            r"something else: all_(gather|reduce)\(axes=\('ep',\)\) of \[float32\[4\]\]",
        ),
        (("reduce", "reshaped"), r"something else: all_reduce.*\[float32\[(4|2, 2)\]\], 16 bytes"),
        (("even", "uneven"), r"something else: all_to_all.*float32\[\]\], (8|12|4) bytes"),
    ],
)
def test_ranks_that_part_ways_are_told_apart_though_sizes_agree(
    ranks2: Farm, kinds: tuple[str, str], what: str
) -> None:
    with pytest.raises(Divergence, match=what) as caught:
        ranks2.run(part_ways, MESH, [kinds] * 2)
    assert "Every rank of a fiber must start the same" in str(caught.value)
