"""How the processes of one host find each other: a connected socket for each pair of them."""

from __future__ import annotations

import os
import secrets
import socket
import struct
from pathlib import Path

import torch.distributed as dist

RANK = struct.Struct("=q")
CREDENTIALS = struct.Struct("=iII")  # process, user, group


def meet(rank: int, world: int, timeout: float) -> dict[int, socket.socket]:
    """A connected socket to every other rank of this host; none where a host cannot do this.

    Every rank has to call. Sockets have names that only processes of this host and network can
    reach, and connections of other users are turned away.
    """
    host = _host()
    with socket.socket(*_kind()) if host else socket.socket() as listener:
        name = b"\0functional-ep-" + secrets.token_hex(16).encode()
        if host:
            listener.bind(name)
            listener.listen(world)
            listener.settimeout(timeout)
        found: list[tuple[str, bytes]] = [("", b"")] * world
        dist.all_gather_object(found, (host, name))
        near = [r for r, (other, _) in enumerate(found) if host and other == host and r != rank]
        connections: dict[int, socket.socket] = {}
        try:
            for peer in (r for r in near if r < rank):
                connections[peer] = _connect(found[peer][1], rank)
            while len(connections) < len(near):
                connection, _ = listener.accept()
                peer = _greeting(connection, timeout)
                if peer is not None:
                    connections[peer] = connection
        except OSError as error:
            missing = sorted(set(near) - set(connections))
            raise RuntimeError(
                f"rank {rank} could not connect to ranks {missing} of this host within "
                f"{timeout:g} s: see their own errors ({error})"
            ) from error
    return connections


def _connect(name: bytes, rank: int) -> socket.socket:
    connection = socket.socket(*_kind())
    connection.connect(name)
    connection.send(RANK.pack(rank))
    return connection


def _greeting(connection: socket.socket, timeout: float) -> int | None:
    """The rank that has connected; None of a stranger, who is turned away."""
    if _user(connection) != os.getuid():
        connection.close()
        return None
    connection.settimeout(timeout)
    (peer,) = RANK.unpack(connection.recv(RANK.size))
    connection.settimeout(None)
    return int(peer)


def _kind() -> tuple[int, int]:
    return socket.AF_UNIX, socket.SOCK_SEQPACKET


def _host() -> str:
    """What this process has in common with those that it can share memory with, or nothing."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if not hasattr(os, "memfd_create") or not boot.exists() or not network.exists():
        return ""
    return f"{boot.read_text().strip()} {network.stat().st_ino} {os.getuid()}"


def _user(connection: socket.socket) -> int:
    """Who has connected, as the kernel knows."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return CREDENTIALS.unpack(found)[1]
