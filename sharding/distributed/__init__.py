"""Real ranks: one process per rank, started by torchrun. The only import of torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sharding.distributed.nccl import NcclComm
from sharding.distributed.pairwise import PairwiseComm
from sharding.distributed.ranks import DistributedComm
from sharding.distributed.rendezvous import fresh_store
from sharding.mesh import Mesh

LATER = 30.0  # seconds after us that NCCL gives up as well, and ends the process
LONGEST = 200  # bytes of an error that other ranks are told of
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def distributed(
    mesh: Mesh, *, timeout: float = 600.0, device: str | None = None
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
        ValueError: the mesh has not as many ranks as there are processes.
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
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ours:
        _join(device, timeout)
    try:
        kind = NcclComm if device == "cuda" else PairwiseComm
        sizes = dict(mesh.sizes) or {"world": 1}
        devices = init_device_mesh(
            device, tuple(sizes.values()), mesh_dim_names=tuple(sizes.keys())
        )
        comm = kind(mesh, dist.get_rank(), devices, timeout)
        try:
            yield comm
        except BaseException as error:
            comm.close(repr(error)[:LONGEST])
            raise
        comm.close()
    finally:
        if ours:
            dist.destroy_process_group()


def _join(device: str, timeout: float) -> None:
    """The process group of torchrun's ranks, in a store of this start alone."""
    backend, later = ("nccl", LATER) if device == "cuda" else ("gloo", 0.0)
    store, rank, ranks = fresh_store(timeout)
    patience = timedelta(seconds=timeout + later)
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=ranks)
