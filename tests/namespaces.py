"""Two hosts on one machine: network namespaces that reach only each other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

INTERFACE = "veth"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


class Namespaces:
    """Two network namespaces with a cable between them, and the processes started in them.

    Raises:
        OSError: they cannot be made here; the message says why.
    """

    def __init__(self) -> None:
        self.names = [f"hosts-{os.getpid()}-{i}" for i in range(2)]
        self.addresses = [f"10.213.0.{i + 1}" for i in range(2)]
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Namespaces:
        if shutil.which("ip") is None:
            raise OSError("there is no command ip (package iproute2)")
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            cable = f"cable{os.getpid()}"  # as a name of both ends it would be taken twice
            peer = ("peer", "name", INTERFACE, "netns", second)
            _ip("link", "add", cable, "netns", first, "type", "veth", *peer)
            _ip("-n", first, "link", "set", cable, "name", INTERFACE)
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
                for interface in ("lo", INTERFACE):
                    _ip("-n", name, "link", "set", interface, "up")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in range(2):
            self.kill(host)
        for process in self.started:
            process.wait()
        for name in self.names:
            with suppress(OSError):
                _ip("netns", "del", name)

    def torchrun(self, host: int, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Start torchrun on a host; what it and its ranks print goes to ``log``."""
        command = ["ip", "netns", "exec", self.names[host], *TORCHRUN, *arguments]
        settings = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=out)
        self.started.append(process)
        return process

    def kill(self, host: int) -> None:
        """End all processes of a host at once, without a word."""
        with suppress(OSError):
            for pid in _ip("netns", "pids", self.names[host]).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def _ip(*arguments: str) -> str:
    """What ``ip`` prints."""
    command: Sequence[str] = ("ip", *arguments)
    ran = subprocess.run(command, capture_output=True, text=True, timeout=10)
    if ran.returncode:
        raise OSError(f"{' '.join(command)}: {ran.stderr.strip()}")
    return ran.stdout
