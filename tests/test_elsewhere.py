"""A step on another device than the CPU: the same numbers, none on the wrong device, few waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from closeness import assert_close
from elsewhere import ELSEWHERE, Remote, Waits, elsewhere, here, there
from hf_cases import batch_of, build, part_of, plan_of
from optree import tree_leaves
from states import a_plan, alone, state_of
from torch.utils._python_dispatch import TorchDispatchMode

from functional_ep import (
    Optimizer,
    adamw,
    from_huggingface,
    init_state,
    lm,
    make_train_step,
    restore,
    save,
    sgd,
)
from functional_ep.checkpoint import restoring
from functional_ep.checkpoint.parts import Buffers, parts_of
from functional_ep.huggingface.objective import load_balance
from functional_ep.moe import dispatch
from functional_ep.routing import count_experts
from sharding import Comm, Mesh, Precision, expert_parallel, make_plan, simulate, zero3
from sharding.sharded import Backward
from sharding.tree import flatten

CFG = lm.Config(vocab=64, dim=32, layers=3, heads=2, experts=8, top_k=2, ffn=32)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
IDS = torch.randint(0, CFG.vocab, (4, 17), generator=torch.Generator().manual_seed(0))


def where(away: bool) -> torch.device:
    return ELSEWHERE if away else torch.device("cpu")


def batch_of_ids(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids[..., :-1], "labels": ids[..., 1:]}


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, s, i: torch.func.grad(f)(s, i),
    "vmap": lambda f, s, i: torch.vmap(lambda one: torch.func.grad(f)(s, one[None]))(i),
}
Counts = Counter[tuple[str, str]]


class Case(NamedTuple):
    backward: Backward = "keep"
    optimizer: Optimizer = adamw(1e-2)
    commit: str | None = None
    donate: bool = False
    mesh: Mesh = Mesh(edp=2, ep=2)
    dtype: torch.dtype = torch.float64
    precision: Precision = Precision()


def trained(case: Case, away: bool) -> list[tuple[Any, Any, Counts]]:
    """Of each rank: metrics and params after three steps, and the waits of the last of them."""

    def program(comm: Comm, ids: torch.Tensor) -> tuple[Any, Any, Counts]:
        params = lm.init(CFG, dtype=case.dtype)
        plan = make_plan(params, lm.labels, RULES, comm.mesh, case.precision)
        loss = lm.loss(CFG, plan, comm, case.backward)
        rest: Any = dict(clip=0.1, donate=case.donate, commit=case.commit)
        step = make_train_step(loss, plan, case.optimizer, comm, **rest)
        shards, batch = plan.shard(params, comm), {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        with Waits() as waits:
            if away:
                shards, batch = there(shards), there(batch)
            state, metrics = init_state(shards, plan, case.optimizer), {}
            for _ in range(3):
                waits.counts.clear()
                state, metrics = step(state, batch)
            counts = Counter(waits.counts)
            own: Callable[[Any], Any] = here if away else lambda tree: tree
            return own(metrics), own(state.params), counts

    with elsewhere():
        return simulate(program, case.mesh, IDS.tensor_split(case.mesh.size), device=where(away))


CASES = {
    "keep": Case(),
    "regather": Case("regather"),
    "recompute": Case("recompute"),
    "sgd": Case(optimizer=sgd(0.1, momentum=0.9)),
    "vote": Case(commit="vote"),
    "donate": Case(donate=True),
    "one rank": Case(mesh=Mesh(edp=1, ep=1)),
    "four experts' ranks": Case(mesh=Mesh(edp=1, ep=4)),
    "float32": Case(dtype=torch.float32, optimizer=sgd(0.1)),
    "bfloat16": Case(
        dtype=torch.float32, optimizer=sgd(0.1), precision=Precision(torch.bfloat16, torch.float32)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_elsewhere_is_one_on_the_cpu(name: str) -> None:
    case = CASES[name]
    rtol = {torch.float64: 1e-9, torch.float32: 1e-5}[case.dtype]
    for found, expected in zip(trained(case, True), trained(case, False), strict=True):
        if case.precision.compute:  # near ties of routers fall otherwise
            assert_close(found[0]["loss"], expected[0]["loss"], "loss", rtol=1e-2)
            continue
        for x, y in zip(leaves_of(found), leaves_of(expected), strict=True):
            assert_close(x, y, name, rtol)


@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_the_counts_of_each_layer_and_once_for_the_ranks(name: str) -> None:
    """Once for whether batches are alike, before anything can hang on it, and once for a vote."""
    case = CASES[name]
    layers = CFG.layers * (2 if case.backward == "recompute" else 1)
    ranks = {"agreement.py": 1} if case.mesh.size > 1 else {}
    votes = {"poll.py": 1} if case.commit else {}
    for _, _, counts in trained(case, True):
        assert waits(counts, "read") == {"moe.py": layers, **ranks, **votes}
        assert waits(counts, "sent").keys() <= {"agreement.py", "poll.py"}


def leaves_of(result: Any) -> list[torch.Tensor]:
    """Metrics and params."""
    metrics, params, _ = result
    return [*tree_leaves(metrics), *tree_leaves(params)]


def waits(counts: Counts, kind: str) -> dict[str, int]:
    """How often in which file."""
    found: Counter[str] = Counter()
    for (what, line), times in counts.items():
        found[line.split(":")[0]] += times if what == kind else 0
    return {file: times for file, times in found.items() if times}


# -- a model of transformers -----------------------------------------------------------------------


def gradients(
    model_type: str, away: bool, masked: bool = True
) -> tuple[dict[str, torch.Tensor], Counts]:
    """Of one loss, by name, on rank 0; and its waits."""
    model = build(model_type)
    batch = batch_of(model)
    if not masked:
        del batch["attention_mask"]

    def program(comm: Comm) -> tuple[dict[str, torch.Tensor], Counts]:
        bare, mine = from_huggingface(model), part_of(batch, comm.mesh, comm.rank)
        plan = plan_of(bare, comm.mesh)
        loss = bare.loss(plan, comm, training=False)
        with Waits() as counted:
            shards, mine = bare.load(plan, comm), there(mine) if away else mine
            counted.counts.clear()
            leaves = [x.requires_grad_() for x in shards.values()]
            total, *_ = loss(shards, mine)
            grads = torch.autograd.grad(total, leaves, materialize_grads=True)
            found = dict(zip(shards, grads, strict=True))
            return here(found) if away else found, Counter(counted.counts)

    with elsewhere():
        return simulate(program, Mesh(edp=2, ep=2), device=where(away))[0]


# Experts that are modules of their own, complex rotations, biases, an encoder, states, pictures.
MODELS = (
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "llama4", "dbrx", "jetmoe"),
    *("switch_transformers", "nemotron_h", "qwen3_next", "qwen3_vl_moe"),
)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_of_transformers_elsewhere_is_that_on_the_cpu(model_type: str) -> None:
    (found, counts), (expected, _) = (gradients(model_type, away) for away in (True, False))
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, g in expected.items():
        assert_close(found[name] / largest, g / largest, name, rtol=1e-5)
    if model_type in ("mixtral", "qwen3_moe", "gpt_oss"):
        assert waits(counts, "read") == {"moe.py": 2}, "once for each layer"
    if model_type != "jetmoe":  # whose own code counts on the host
        assert waits(counts, "sent").keys() <= {"replica.py"}, "buffers, once"


def test_sums_of_the_objective_begin_there() -> None:
    _, counts = gradients("mixtral", away=True, masked=False)
    assert waits(counts, "sent").keys() == {"replica.py"}
    counts = on_one_rank(lambda x: load_balance((x[None],), 2, None))
    assert list(waits(counts, "sent")) == ["simulate.py"], "the logits' own way there"


# -- transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_elsewhere_are_those_on_the_cpu(name: str) -> None:
    def program(comm: Comm, ids: torch.Tensor, away: bool) -> Any:
        params = lm.init(CFG, dtype=torch.float64)
        plan = make_plan(params, lm.labels, RULES, comm.mesh)
        loss, shards = lm.loss(CFG, plan, comm), plan.shard(params, comm)
        with Waits():
            if away:
                shards, ids = there(shards), there(ids)
            result = TRANSFORMS[name](lambda s, i: loss(s, batch_of_ids(i))[0], shards, ids)
            return tree_leaves(here(result) if away else result)

    mesh = Mesh(edp=1, ep=2)
    with elsewhere():
        ranks = [
            simulate(partial(program, away=away), mesh, IDS.tensor_split(2), device=where(away))
            for away in (True, False)
        ]
    for found, expected in zip(*ranks, strict=True):
        for x, y in zip(found, expected, strict=True):
            assert_close(x, y, name)


# -- a state that is restored there ----------------------------------------------------------------


class Serial:
    """As many threads as the device of Python has."""

    def __init__(self, threads: int) -> None: ...

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = map


def test_a_state_is_restored_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "ThreadPoolExecutor", Serial)
    plan = a_plan(Mesh(ep=2), dict.fromkeys(("expert", "dense", "still"), zero3("ep")))

    def saving(comm: Comm) -> None:
        save(tmp_path / "one", state_of(plan, comm.rank, 3), plan, comm)

    def loading(comm: Comm) -> list[torch.Tensor]:
        with Waits():
            state = restore(tmp_path / "one", plan, comm)
            held, _ = flatten((state.params, state.opt))
            assert all(isinstance(x, Remote) for x in held)
            return flatten(here(state))[0]

    simulate(saving, plan.mesh)
    with elsewhere():
        for rank, found in enumerate(simulate(loading, plan.mesh, device=ELSEWHERE)):
            expected, _ = flatten(state_of(plan, rank, 3))
            assert all(map(torch.equal, found, expected))


class Copies(TorchDispatchMode):
    """Notes which copies the host has to wait for."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.noted.append("copied" if args[2:] == (True,) else "copied and waited")
        return func(*args, **kwargs or {})


def test_a_save_waits_for_all_of_its_copies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    noted, empty, plan = list[str](), torch.empty, alone()
    stream = SimpleNamespace(synchronize=lambda: noted.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", {ELSEWHERE: stream}.__getitem__)

    def unpinned(*shape: Any, pin_memory: bool, **rest: Any) -> torch.Tensor:
        assert pin_memory, "else the host waits all the same"
        return empty(*shape, **rest)

    def program(comm: Comm) -> None:
        parts = parts_of(state_of(plan, comm.rank, 3), plan, comm)
        with Waits():
            away = [part._replace(x=there(part.x)) for part in parts]
            monkeypatch.setattr(torch, "empty", unpinned)
            with Copies(noted):
                found = Buffers().copies(away)
        assert noted == ["copied"] * len(parts) + ["waited"]
        assert all(torch.equal(x.x, part.x) for x, part in zip(found, parts, strict=True))

    with elsewhere():
        simulate(program, plan.mesh)


# -- what the tests have to find -------------------------------------------------------------------


def on_one_rank(program: Callable[[torch.Tensor], Any]) -> Counts:
    def run(comm: Comm) -> Counts:
        with Waits() as counted:
            program(there(torch.ones(3)))
            return counted.counts

    with elsewhere():
        return simulate(run, Mesh())[0]


MIXED: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda x: x + torch.ones(3),
    lambda x: x[torch.tensor([1, 2])],
    lambda x: torch.mul(x, x.to("cpu")),
)


@pytest.mark.parametrize("mixed", MIXED)
def test_tensors_of_two_devices_are_refused(mixed: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="of tensors on two devices"):
        on_one_rank(mixed)


@pytest.mark.parametrize(
    ("what", "waiting"),
    [
        ("read", lambda x: x.sum().item()),
        ("read", lambda x: bool(x[0] > 0)),
        ("read", lambda x: x.long().tolist()),
        ("read", lambda x: x[x > 0]),
        ("read", lambda x: torch.bincount(x.long())),
        ("read", lambda x: x.cpu()),
        ("sent", lambda x: torch.tensor([1, 2], device=x.device)),
        ("", lambda x: torch.arange(3, device=x.device) + 1.5 * x),
    ],
)
def test_what_waits_is_counted(what: str, waiting: Callable[[torch.Tensor], Any]) -> None:
    counts = on_one_rank(waiting)
    found = [kind for kind, _ in counts.elements()]
    assert found == ["sent"] + [what] * bool(what), "the first is the tensor's own way there"


def test_leaves_of_several_dtypes_are_updated_elsewhere() -> None:
    def updated(away: bool) -> list[torch.Tensor]:
        leaves = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(1)]
        with Waits():
            p, g, m, v = (there(leaves) if away else [x.clone() for x in leaves] for _ in range(4))
            step, factor = torch.tensor(1), there(torch.tensor(0.5)) if away else torch.tensor(0.5)
            new, _ = adamw(0.1).update(step, p, g, {"m": m, "v": v}, True, factor)
            return here(new) if away else new

    usual = torch.get_default_dtype()
    with elsewhere():
        assert all(map(torch.equal, updated(True), updated(False)))
        try:
            torch.set_default_dtype(torch.float64)
            updated(True)
        finally:
            torch.set_default_dtype(usual)


@pytest.mark.parametrize("mesh", [Mesh(ep=1), Mesh(ep=2)], ids=str)
def test_an_expert_that_is_none_is_missed_elsewhere(mesh: Mesh) -> None:
    def run(comm: Comm) -> None:
        with Waits():
            ids = there(torch.tensor([[0, 4], [-1, 2]]))
            assert here(count_experts(ids, 4)).tolist() == [1, 0, 1, 0]
            dispatch(there(torch.ones(2, 3)), ids, 4, ("ep",), comm)

    with elsewhere(), pytest.raises(ValueError, match="2 of 4 expert ids are not from 0 to 3"):
        simulate(run, mesh)
