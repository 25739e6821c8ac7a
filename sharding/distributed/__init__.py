"""Real ranks: one process per rank, started by torchrun. No group is named outside of here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from sharding.distributed.nccl import LATER, NcclComm
from sharding.distributed.pairwise import PairwiseComm
from sharding.distributed.ranks import DistributedComm
from sharding.distributed.rendezvous import fresh_store
from sharding.mesh import Mesh

LONGEST = 200  # bytes of an error that other ranks are told of
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def distributed(
    mesh: Mesh, *, timeout: float = 600.0, device: str | torch.device | None = None
) -> Iterator[DistributedComm]:
    """This process as one rank of ``mesh``: ``with distributed(mesh) as comm: program(comm, ...)``.

    Start the script with ``torchrun --nproc-per-node N script.py``. A process group that exists
    already is used and left alone.

    Args:
        mesh: the ranks; its size is the number of processes.
        timeout: seconds that a rank waits for another one in a collective, or that a collective
            takes on CUDA. Then all ranks are asked where they stand, those that do not answer
            within three seconds are taken for gone, and the ranks that wait raise a
            ``Divergence`` with the table: on CPU at once, as when a rank is seen to be gone or to
            have started something else; on CUDA at their next collective, printing it before,
            and if they never come to one, NCCL ends them half a minute later.
        device: ``"cuda"`` (NCCL) or ``"cpu"`` (gloo); by default CUDA where there is one.

    Raises:
        RuntimeError: torchrun's variables are missing.
        ValueError: the mesh has not as many ranks as there are processes; another device.
        Divergence: from a collective, if ranks part ways.

    >>> with distributed(Mesh(ep=2)) as comm:  # doctest: +ELLIPSIS
    ...     comm.all_reduce([torch.ones(1)], ("ep",))
    Traceback (most recent call last):
      ...
    RuntimeError: ...Start the script with: torchrun --nproc-per-node 2 SCRIPT...
    """
    ours = not dist.is_initialized()
    if ours:
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise RuntimeError(
                f"distributed({mesh}): {', '.join(missing)} not set in the environment. Start the "
                f"script with: torchrun --nproc-per-node {mesh.size} SCRIPT. Without a launcher, "
                f"simulate(program, {mesh}, ...) runs the same program in one process"
            )
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if world != mesh.size:
        raise ValueError(
            f"{mesh} has {mesh.size} ranks, but {world} processes were started: start {mesh.size} "
            f"(torchrun --nproc-per-node {mesh.size}), or axes whose sizes multiply to {world}"
        )
    kind = _kind(device) or ("cuda" if _has_cuda(ours) else "cpu")
    if ours:
        _join(kind, timeout)
    ends_well = kind == "cpu"  # else NCCL would wait here for ranks that are stuck
    try:
        comm = _comm(mesh, timeout, kind)
        try:
            yield comm
        except BaseException as error:
            comm.close(repr(error)[:LONGEST])
            raise
        comm.close()
        ends_well = True
    finally:
        if ours and ends_well:
            dist.destroy_process_group()


def _kind(device: str | torch.device | None) -> str:
    """``"cpu"``, ``"cuda"`` or nothing; which of a host's GPUs a rank has is not said here."""
    if device is None or str(device) in ("cpu", "cuda"):
        return str(device or "")
    raise ValueError(
        f"distributed(..., device={str(device)!r}): 'cpu' or 'cuda'. A rank has the GPU of its "
        "LOCAL_RANK, or of torch.cuda.set_device in a process group that exists already"
    )


def _has_cuda(ours: bool) -> bool:
    """Whether there are GPUs, which a process group that exists already may not be for."""
    return torch.cuda.is_available() and (ours or _serves("nccl"))


def _serves(backend: str) -> bool:
    """Whether the process group is of this backend; one that was begun without has all."""
    return any(name in dist.get_backend() for name in (backend, "undefined"))


def _comm(mesh: Mesh, timeout: float, kind: str) -> DistributedComm:
    wanted = "nccl" if kind == "cuda" else "gloo"
    if not _serves(wanted):
        raise ValueError(
            f"distributed(..., device={kind!r}) in a process group of {dist.get_backend()}: that "
            f"needs one of {wanted}, or leave out device"
        )
    if kind == "cpu":
        return PairwiseComm(mesh, dist.get_rank(), timeout, torch.device(kind))
    here = torch.device(kind, torch.cuda.current_device())
    return NcclComm(mesh, dist.get_rank(), timeout, here)


def _join(device: str, timeout: float) -> None:
    """The process group of torchrun's ranks, in a store of this start alone.

    Each has the GPU of its number on the host, or the only one that its launcher lets it see.
    """
    if device == "cuda" and torch.cuda.device_count() > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend, later = ("nccl", LATER) if device == "cuda" else ("gloo", 0.0)
    store, rank, ranks = fresh_store(timeout)
    patience = timedelta(seconds=timeout + later)
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=ranks)
