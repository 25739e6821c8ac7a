"""Starts the processes of a run, waits for their answers, and ends them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from peers.rank import Reply, Request
from peers.systems import SYSTEMS

BENCHMARKS = Path(__file__).parents[1]
ROOT = BENCHMARKS.parents[1]
# glibc keeps some of the memory that is freed, so that fewer pages of the next large tensor cost a
# fault each. Told to keep all of it, it is fastest; told to return it, what is resident is in use.
MALLOC = {
    "default": {},
    "returned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)},
    "kept": {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
}
ALIKE = {
    "OMP_WAIT_POLICY": "PASSIVE",  # other work may want the cores
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{ROOT}",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DS_ACCELERATOR": "cpu",
}
PORTS = range(20_000, 32_768)  # below those that a system gives to connections that ask for any
GRACE = 5.0  # seconds that ranks have to end after one has failed


class RunFailed(RuntimeError):
    """A run gave no result; the message is the end of what the first rank that failed said."""


def launch(request: Request, python: Path, ranks: int, malloc: str, seconds: float) -> list[Reply]:
    """One reply of each process.

    Args:
        request: the same for all of them.
        python: the interpreter that has the system's packages.
        ranks: how many processes, unless the system says how many.
        malloc: a key of ``MALLOC``.
        seconds: after which the run is ended.

    Raises:
        RunFailed: a process failed, or none answered in time.
    """
    system = SYSTEMS[request.system]
    with tempfile.TemporaryDirectory(prefix="peers-") as directory:
        place, processes = Path(directory), system.processes or ranks
        (place / "request").write_text(json.dumps(request._asdict()))
        common = {
            **os.environ,
            **ALIKE,
            **MALLOC[malloc],
            "OMP_NUM_THREADS": str(system.threads),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_PORT": str(_free_port()),
            "TORCH_EXTENSIONS_DIR": str(python.parents[1] / "extensions"),
        }
        running = [_start(python, place, rank, common) for rank in range(processes)]
        try:
            _wait(running, place, time.monotonic() + seconds)
        finally:
            for process in running:
                _end(process)
        return [
            Reply(**json.loads((place / f"reply-{rank}").read_text())) for rank in range(processes)
        ]


def _start(python: Path, place: Path, rank: int, common: dict[str, str]) -> subprocess.Popen[bytes]:
    with (place / f"output-{rank}").open("wb") as output:
        return subprocess.Popen(
            [str(python), "-m", "peers.rank", str(place / "request"), str(place / f"reply-{rank}")],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=place,
            start_new_session=True,
        )


def _wait(running: Sequence[subprocess.Popen[bytes]], place: Path, until: float) -> None:
    """Until each process has answered; how it ends after that is of no matter."""
    failed: int | None = None
    while waiting := [r for r in range(len(running)) if not (place / f"reply-{r}").exists()]:
        ended = [rank for rank in waiting if running[rank].poll() is not None]
        if ended and failed is None:
            failed, until = ended[0], min(until, time.monotonic() + GRACE)
        if time.monotonic() > until or len(ended) == len(waiting):
            rank = waiting[0] if failed is None else failed
            how = "no answer in time" if failed is None else f"exit code {running[rank].poll()}"
            raise RunFailed(f"rank {rank}, {how}: {_last_words(place, rank)}")
        time.sleep(0.05)


def _last_words(place: Path, rank: int) -> str:
    lines = (place / f"output-{rank}").read_text(errors="replace").strip().splitlines()
    raised = [line for line in lines if "Error" in line or "Exception" in line]
    return " ".join((raised or lines or ["it said nothing"])[-1].split())[:300]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it has started, which are a group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RuntimeError(f"none of the ports {PORTS} is free")
