"""functional-ep on the same weights: experts follow EP, the rest ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_ep import Precision, adamw, from_huggingface, init_state, make_train_step
from peers.model import BETAS, CLIP, DECAY, EPS, RATE, batch_of
from peers.shapes import Job
from peers.trainer import Trainer, dtype_of
from sharding import Comm, Mesh, distributed, expert_parallel, make_plan, zero3
from sharding.comm import Op, Work
from sharding.sharded import Backward

RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


class Counting(Comm):
    """Another comm; ``sent`` is what :mod:`peers.traffic` would count of it while active."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm.mesh, comm.rank)
        self.comm, self.device, self.sent = comm, comm.device, 0

    def __enter__(self) -> Counting:
        self.sent = 0
        return self

    def __exit__(self, *_: object) -> None: ...

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        self.sent += leaving(self, op, xs)
        return self.comm.start(op, xs)


def leaving(comm: Comm, op: Op, xs: Sequence[Tensor]) -> int:
    """Bytes that a collective sends from this rank to others."""
    n, whole = len(comm.fiber(op.axes)), sum(x.nbytes for x in xs)
    rows = sum(op.send) - op.send[comm.index(op.axes)] if op.send else 0
    return {
        "all_gather": (n - 1) * whole,
        "reduce_scatter": (n - 1) * whole // n,
        "all_reduce": 2 * (n - 1) * whole // n,
        "all_to_all": whole * rows // max(sum(op.send), 1),
    }[op.kind]


@contextmanager
def start(job: Job, weights: Path, backward: Backward, compile: bool = False) -> Iterator[Trainer]:
    with distributed(Mesh(edp=1, ep=job.ranks), device="cpu") as real:
        comm = Counting(real)
        model = from_huggingface(weights)
        precision = None
        if job.dtype != "float32":
            precision = Precision(compute=dtype_of(job), reduce=torch.float32)
        plan = make_plan(model.shapes, model.labels, RULES, comm.mesh, precision)
        optimizer = adamw(RATE, *BETAS, EPS, DECAY)
        loss = model.loss(plan, comm, backward=backward, compile=compile)
        train = make_train_step(loss, plan, optimizer, comm, clip=CLIP, donate=True)
        state: list[Any] = [init_state(model.load(plan, comm), plan, optimizer)]

        def step(i: int) -> float:
            ids, targets = batch_of(job, i, comm.rank)
            batch = {"input_ids": ids, "labels": targets}
            state[0], metrics = train(state[0], batch)
            return float(metrics["loss"])

        parameters = sum(leaf.numel() for leaf in model.shapes.values())
        yield Trainer(step, parameters, lambda: comm)
