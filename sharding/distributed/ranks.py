"""What all real ranks have in common."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from sharding.comm import Comm
from sharding.mesh import Mesh


class DistributedComm(Comm):
    """One rank of a process group. ``devices`` is the same mesh as torch's ``DeviceMesh``."""

    def __init__(self, mesh: Mesh, rank: int, devices: DeviceMesh, timeout: float) -> None:
        super().__init__(mesh, rank)
        self.devices = devices
        self.timeout = timeout
        self.started = 0

    def close(self) -> None:
        """Give back what only this comm uses; collectives end here."""
