"""Where the time of a profiled step goes: every microsecond in one category, by what ran in it.

Ranges are opened around a Comm's transfers, the optimizer and the parts of a model, all from
outside. What an operator of the backward pass belongs to is known from the operator of the forward
pass that it is the derivative of: the profiler gives both the same number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.profiler import record_function

from functional_ep import Optimizer
from sharding import Comm
from sharding.comm import Op, Work

STEP, MODEL = "step", "model"
TRANSFERS = {
    "all_gather": "gather",
    "reduce_scatter": "reduce",
    "all_to_all": "all-to-all",
    "all_reduce": "sums over ranks",
}
OPTIMIZER, GEMM, PERMUTATION = "optimizer", "expert GEMM", "permutation"
PARTS = {"self_attn": "attention", "gate": "routing", "experts": "experts, elementwise"}
REST, CLIPPING, PYTHON = "embedding, norms, head, loss", "scaling, clipping, sums", "Python"
CATEGORIES = (
    *TRANSFERS.values(),
    *("routing", PERMUTATION, GEMM, "experts, elementwise", "attention"),
    *(REST, CLIPPING, OPTIMIZER, PYTHON),
)
WHOLE = {*TRANSFERS.values(), OPTIMIZER}  # with the Python and the waiting inside of them
PRODUCTS = ("mm", "_grouped_mm", "bmm", "addmm", "matmul")
MOVES = ("sort", "argsort", "index", "gather", "scatter", "bincount", "cumsum", "repeat_interleave")
BACKWARD = "autograd::engine::evaluate_function: "


class Transfers(Comm):
    """Another comm, whose every start and wait is a range."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm.mesh, comm.rank)
        self.comm, self.device = comm, comm.device

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        with record_function(TRANSFERS[op.kind]):
            return _Waiting(TRANSFERS[op.kind], self.comm.start(op, xs))


class _Waiting(NamedTuple):
    name: str
    work: Work

    def wait(self) -> list[Tensor]:
        with record_function(self.name):
            return self.work.wait()


def in_range(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; its calls are ranges."""

    def inside(*args: Any) -> Any:
        with record_function(name):
            return f(*args)

    return inside


def with_range(optimizer: Optimizer) -> Optimizer:
    return optimizer._replace(update=in_range(OPTIMIZER, optimizer.update))


def mark(model: nn.Module) -> None:
    """Make ranges of the forward passes of attention, routers and experts, by their names."""
    for path, module in model.named_modules():
        part = PARTS.get(path.rpartition(".")[2])
        if part is not None:
            opened: list[record_function] = []
            module.register_forward_pre_hook(_opening(part, opened))
            module.register_forward_hook(
                lambda *_, opened=opened: opened.pop().__exit__(None, None, None)
            )


def _opening(part: str, opened: list[record_function]) -> Callable[..., None]:
    def enter(*_: Any) -> None:
        opened.append(record_function(part).__enter__())

    return enter


class Event(NamedTuple):
    """Of a profile: what is needed of one operator or range."""

    name: str
    microseconds: float  # without those of the events inside of it
    parents: tuple[str, ...]  # names of the events around it, the outermost first
    numbers: tuple[int, ...]  # those that the profiler gave to it and to the events around it


def breakdown(events: Iterable[Event]) -> dict[str, float]:
    """``{category: microseconds}`` of the events in steps; they add up to the steps' own time.

    >>> inside = ("step", "model", "experts, elementwise")
    >>> dict(breakdown([Event("aten::mm", 3.0, inside, (7,)), Event("step", 1.0, (), ())]))
    {'expert GEMM': 3.0, 'Python': 1.0}
    """
    inside = [e for e in events if STEP in (e.name, *e.parents)]
    forward: dict[int, str] = {}
    for event in inside:
        part = _part((*event.parents, event.name))
        if part is not None:
            forward |= {number: forward.get(number, part) for number in event.numbers}
    times: dict[str, float] = defaultdict(float)
    for event in inside:
        times[_category(event, forward)] += event.microseconds
    return dict(times)


def _category(event: Event, forward: Mapping[int, str]) -> str:
    around = (*event.parents, event.name)
    whole = next((name for name in reversed(around) if name in WHOLE), None)
    if whole is not None:
        return whole
    if not event.name.startswith("aten::"):
        return PYTHON
    part = _part(around)
    if part is None and _is_backward(event):
        known = (forward[n] for n in reversed(event.numbers) if n in forward)
        part = next(known, REST)
    if part is None:
        return CLIPPING
    if part == PARTS["experts"]:
        operator = event.name.removeprefix("aten::")
        return GEMM if operator in PRODUCTS else PERMUTATION if _moves(operator) else part
    return part


def _part(around: tuple[str, ...]) -> str | None:
    """The innermost part of the model that is open, none outside of the model."""
    parts = PARTS.values()
    inner = next((name for name in reversed(around) if name in parts), None)
    return inner or (REST if MODEL in around else None)


def _is_backward(event: Event) -> bool:
    return any(name.startswith(BACKWARD) for name in (*event.parents, event.name))


def _moves(operator: str) -> bool:
    return operator.startswith(MOVES)


def events_of(profile: Any) -> list[Event]:
    """Those of a :class:`torch.profiler.profile` that has ended."""
    found: list[Event] = []
    for event in profile.events():
        names, numbers, parent = [], [event.sequence_nr], event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            numbers.append(parent.sequence_nr)
            parent = parent.cpu_parent
        known = tuple(n for n in reversed(numbers) if n >= 0)
        time = event.self_cpu_time_total
        found.append(Event(event.name, time, tuple(reversed(names)), known))
    return found


def table(times: Iterable[Mapping[str, float]]) -> str:
    """Milliseconds of each rank, a row for each category and one for their sum."""
    ranks = [dict(each) for each in times]
    totals = [sum(each.values()) for each in ranks]
    rows = [("", *(f"rank {rank}" for rank in range(len(ranks))), "of all")]
    for name in (*CATEGORIES, "together"):
        ms = totals if name == "together" else [each.get(name, 0.0) for each in ranks]
        share = sum(ms) / sum(totals)
        rows.append((name, *(f"{x / 1e3:.1f} ms" for x in ms), f"{share:.1%}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        f"{row[0]:{widths[0]}}  "
        + "  ".join(f"{cell:>{n}}" for cell, n in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
