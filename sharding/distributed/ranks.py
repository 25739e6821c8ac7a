"""What all real ranks have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from sharding.comm import Comm, Divergence
from sharding.distributed.watch import Watch
from sharding.divergence import table
from sharding.mesh import Mesh


class DistributedComm(Comm):
    """One rank of a process group, whose tensors are on one device."""

    def __init__(self, mesh: Mesh, rank: int, timeout: float, device: torch.device) -> None:
        super().__init__(mesh, rank)
        self.timeout, self.device = timeout, device
        store = dist.distributed_c10d._get_default_store()
        self.watch = Watch(self.place, rank, mesh.size, store, self.overdue)

    def overdue(self) -> str:
        """What of this rank's collectives has not completed, where waiting does not show it."""
        return ""

    def parted(self, problem: str, gone: Mapping[int, str]) -> Divergence:
        """The error of ranks that part ways, with a table of where all of them stand."""
        return Divergence(table(problem, self.mesh, self.watch.states(gone)))

    def close(self, how: str = "") -> None:
        """Collectives end here; ``how`` says what went wrong, if something did."""
        self.watch.close(how)
