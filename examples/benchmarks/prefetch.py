"""How much of the second gather is hidden behind compute: ``regather`` against ``keep``.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/benchmarks/prefetch.py

On one host the ranks' own cores carry every byte, so that there is nothing to hide behind. Here
each transfer takes as long as on a wire between two hosts as well, which takes no core. The wire
begins when a transfer is started or, to see what is hidden, not before it is awaited: then nothing
runs ahead, and regather is slower than keep by all of the second gather.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peers.shapes import SHAPES, Job
from peers.systems.ours import leaving
from profile_step import trainer
from torch import Tensor
from torch.distributed import get_world_size, init_process_group

from functional_ep.malloc import keep_freed_memory
from sharding import Comm, Mesh, distributed
from sharding.comm import Op, Work
from sharding.sharded import Backward

MODES: tuple[Backward, ...] = ("keep", "regather")
WARM_UP = 2

Times = dict[tuple[Backward, bool], list[float]]


class Wire:
    """A listener of a comm: its transfers take their time, one after the other, but no core."""

    def __init__(self, comm: Comm, gigabits: float, ahead: bool) -> None:
        self.comm, self.ahead = comm, ahead
        self.seconds_per_byte = 8 / (gigabits * 1e9)
        self.free = 0.0  # from when on the wire can carry more

    def __call__(self, op: Op, xs: Sequence[Tensor], work: Work) -> Work:
        sent = Sent(self, leaving(self.comm, op, xs) * self.seconds_per_byte, work)
        return sent.begun() if self.ahead else sent

    def carry(self, seconds: float) -> float:
        """When what takes so long has arrived, if it begins now."""
        self.free = max(self.free, time.perf_counter()) + seconds
        return self.free


class Sent(NamedTuple):
    """A transfer on a wire."""

    wire: Wire
    seconds: float
    work: Work
    arrival: float | None = None

    def begun(self) -> Sent:
        return self._replace(arrival=self.wire.carry(self.seconds))

    def wait(self) -> list[Tensor]:
        arrival = self.wire.carry(self.seconds) if self.arrival is None else self.arrival
        time.sleep(max(0.0, arrival - time.perf_counter()))
        return self.work.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="D")
    parser.add_argument("--length", type=int, default=256, help="of each of two sequences")
    parser.add_argument("--gigabits", type=float, default=10, help="per second, of the wire")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each kind")
    args = parser.parse_args()
    keep_freed_memory()
    init_process_group("gloo")
    job = Job(SHAPES[args.shape], "float32", args.length, ranks=get_world_size())
    with distributed(Mesh(edp=1, ep=job.ranks), device="cpu") as comm:
        runs = [trainer(job, comm, mode) for mode in MODES]
        times: Times = {(mode, ahead): [] for mode in MODES for ahead in (True, False)}
        for i in range(WARM_UP + args.steps):
            for mode, run in zip(MODES, runs, strict=True):
                for ahead in (True, False):
                    comm.all_reduce([torch.zeros(1)], comm.mesh.axes)  # all begin together
                    start = time.perf_counter()
                    with comm.heard_by(Wire(comm, args.gigabits, ahead)):
                        run(i)
                    times[mode, ahead].append(time.perf_counter() - start)
    if comm.rank == 0:
        print(f"{args}, {job.tokens} tokens, torch {torch.__version__}; wall ms of a step")
        report({key: sorted(values[WARM_UP:]) for key, values in times.items()})


def report(times: Times) -> None:
    gaps: dict[bool, float] = {}
    for ahead in (True, False):
        keep, regather = (times[mode, ahead] for mode in MODES)
        gaps[ahead] = statistics.median(regather) - statistics.median(keep)
        print(
            f"{'transfers run ahead' if ahead else 'nothing runs ahead'}: "
            f"keep {spread(keep)}, regather {spread(regather)}, gap {gaps[ahead] * 1e3:.0f}"
        )
    print(f"hidden of the second gather: {1 - gaps[True] / gaps[False]:.0%}")


def spread(times: Sequence[float]) -> str:
    return f"{statistics.median(times) * 1e3:.0f} ({times[0] * 1e3:.0f} to {times[-1] * 1e3:.0f})"


if __name__ == "__main__":
    main()
