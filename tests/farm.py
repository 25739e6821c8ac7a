"""A farm of real ranks: processes that start once and run many programs.

Starting Python, torch and a process group takes seconds; running a small program takes
milliseconds. So the processes stay, and programs and results travel to and fro over pipes.
"""

from __future__ import annotations

import os
import pickle
import random
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from sharding import Comm, Mesh, distributed
from sharding.simulate import PerRank

R = TypeVar("R")
JOIN = 10.0  # seconds that a rank waits for others in a collective
GRACE = 0.5  # seconds for other ranks to end after one has failed


class RankDied(RuntimeError):
    """A process of the farm has ended instead of answering."""


class Farm:
    """``farm.run`` is ``simulate`` on real ranks: one process each, connected by gloo.

    Processes start at the first run. After a program has failed on any rank they are replaced,
    since messages of the failed program may still be under way.

    Args:
        size: the number of processes.
        join: seconds that a rank waits for others in a collective.
    """

    def __init__(self, size: int, join: float = JOIN) -> None:
        self.size, self.join = size, join
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []

    def __enter__(self) -> Farm:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes, unless they are there."""
        if self.processes:
            return
        context, port = get_context("spawn"), free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, port, self.join, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        """End the processes; rank 0, which holds their store, last."""
        for pipe, process in zip(self.pipes[::-1], self.processes[::-1], strict=True):
            pipe.close()
            process.terminate()
            process.join()
        self.pipes, self.processes = [], []

    def run(
        self,
        program: Callable[..., R],
        mesh: Mesh,
        *per_rank: PerRank,
        timeout: float = 60.0,
    ) -> list[R]:
        """``[program(comm_r, *(arg[r] for arg in per_rank)) for r in mesh]``, on real ranks.

        Args:
            program: a function at the top level of a module; it is sent by name.
            mesh: as many ranks as the farm has processes.
            per_rank: for each argument of the program, a sequence of one value per rank.
            timeout: seconds after which the processes are ended.

        Raises:
            RankDied: a process has ended without an answer.
            Exception: what the program raised on the first rank that failed; a note tells where.
        """
        assert mesh.size == self.size, f"{mesh} does not fit the {self.size} processes of the farm"
        self.start()
        try:
            for rank, pipe in enumerate(self.pipes):
                arguments = tuple(values[rank] for values in per_rank)
                pipe.send_bytes(pickle.dumps((program, mesh, arguments)))
            return self._answers(program, time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise

    def _answers(self, program: Callable[..., R], until: float) -> list[R]:
        results: dict[int, R] = {}
        errors: list[BaseException] = []
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting:
            arrived = wait(list(waiting), max(0.0, until - time.monotonic()))
            if not arrived and not errors:
                slow = f"{_name(program)}: no answer from ranks {sorted(waiting.values())}"
                raise TimeoutError(slow)
            if not arrived:
                break
            for pipe in arrived:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                good, value = self._answer(rank, pipe, program)
                if good:
                    results[rank] = value
                else:
                    errors.append(value)
                    until = min(until, time.monotonic() + GRACE)
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(self.size)]

    def _answer(self, rank: int, pipe: Connection, program: Any) -> tuple[bool, Any]:
        try:
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            process = self.processes[rank]
            process.join(GRACE)
            status = f"exit code {process.exitcode}"
            return False, RankDied(f"rank {rank} died during {_name(program)}, {status}")


def _serve(rank: int, size: int, port: int, join: float, pipe: Connection) -> None:
    """What each process does: run the programs that arrive, until the pipe closes."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)  # in torch's jvp
    # In torch's compiler, which hides the second itself, but only from being shown.
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is", DeprecationWarning)
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    comms: dict[Mesh, Comm] = {}
    with ExitStack() as stack:
        # The process group lasts as long as this mesh; those of the programs find it there.
        stack.enter_context(distributed(Mesh(ranks=size), timeout=join, device="cpu"))
        while True:
            try:
                program, mesh, arguments = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            if mesh not in comms:
                comms[mesh] = stack.enter_context(distributed(mesh, timeout=join, device="cpu"))
            pipe.send_bytes(_outcome(rank, program, comms[mesh], arguments))


def _outcome(rank: int, program: Any, comm: Comm, arguments: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps((True, program(comm, *arguments)))
    except BaseException as error:
        where = "".join(traceback.format_tb(sys.exc_info()[2]))
        error.add_note(f"raised on real rank {rank} of {comm.mesh}, at\n{where}")
        try:
            return pickle.dumps((False, pickle.loads(pickle.dumps(error))))
        except Exception:  # what cannot be sent is sent as text
            text = "".join(traceback.format_exception(error))
            return pickle.dumps((False, RuntimeError(text)))


def _name(program: Any) -> str:
    program = getattr(program, "func", program)  # of a partial
    return f"{program.__module__}:{program.__qualname__}"


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection will be given meanwhile."""
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(limits.read_text().split()[0]) if limits.exists() else 49152
    for port in random.SystemRandom().sample(range(1024, max(lowest, 2048)), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("100 random ports are all in use")
