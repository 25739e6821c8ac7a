"""A checkpoint is the state, on every mesh; every number is in it once; it verifies itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import MemoryDisk
from farm import Farm
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from states import MESH, Pair, a_plan, alone, pairs, same, state_of

from functional_ep import (
    State,
    adamw,
    cosine,
    init_state,
    lm,
    make_train_step,
    restore,
    restore_params,
    save,
)
from functional_ep.checkpoint import attached, describe, digest, parts, verify
from functional_ep.checkpoint.disk import DISK, Disk
from functional_ep.checkpoint.folder import read_manifest
from functional_ep.checkpoint.parts import share
from sharding import Comm, Mesh, Plan, expert_parallel, make_plan, replicated, simulate, zero3
from sharding.testing import cases, seeds
from sharding.tree import flatten

ROOT = Path("/saved/here")


def saved(plan: Plan, seed: int, disk: Disk, path: Path = ROOT, **extras: Any) -> None:
    def program(comm: Comm) -> None:
        save(path, state_of(plan, comm.rank, seed), plan, comm, disk=disk, **extras)

    simulate(program, plan.mesh)


def restored(plan: Plan, disk: Disk, path: Path = ROOT) -> list[State]:
    return simulate(lambda comm: restore(path, plan, comm, disk=disk), plan.mesh)


def is_the_state(plan: Plan, seed: int, disk: Disk) -> None:
    for rank, found in enumerate(restored(plan, disk)):
        assert same(found, state_of(plan, rank, seed)), f"the state of rank {rank} is another"


# -- there, and anywhere ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and shares so small that small leaves have several."""
    monkeypatch.setattr(digest, "BLOCK", 16)
    monkeypatch.setattr(parts, "SHARE", 24)


@given(pairs(), seeds())
def test_what_is_restored_on_any_mesh_is_what_was_saved(pair: Pair, seed: int) -> None:
    disk = MemoryDisk()
    saved(pair.old, seed, disk)
    is_the_state(pair.old, seed, disk)
    is_the_state(pair.new, seed, disk)
    assert verify(ROOT, disk=disk).problems == ()


@given(pairs(), seeds())
def test_there_and_back_is_exact(pair: Pair, seed: int) -> None:
    disk, back = MemoryDisk(), Path("/back")
    new = Plan(pair.new.tree, pair.new.rules, pair.new.mesh, {}, pair.new.frozen & {"frozen"})
    saved(pair.old, seed, disk)

    def program(comm: Comm) -> None:
        save(back, restore(ROOT, new, comm, disk=disk), new, comm, disk=disk)

    simulate(program, new.mesh)
    for rank, found in enumerate(restored(pair.old, disk, back)):
        assert same(found, state_of(pair.old, rank, seed))


HARD: list[Callable[[Pair], bool]] = [
    lambda p: p.old.mesh.size > p.new.mesh.size > 1 and bool(p.old.frozen),
    lambda p: p.new.mesh.size == 5 and bool(p.new.frozen) and not p.old.frozen,
    lambda p: any(0 in leaf.shape for leaf in p.old.leaves),
    lambda p: p.old.mesh.size == 1 and len(p.new.rules) == 2,
]


@pytest.mark.parametrize("case", HARD)
def test_pairs_reach_the_hard_cases(case: Callable[[Pair], bool]) -> None:
    find(pairs(), case, settings=settings(phases=[Phase.generate], max_examples=1000))


@pytest.mark.parametrize("shift", [1, -1])
def test_an_interval_that_is_off_is_found(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from functional_ep.checkpoint.reader import Reader, Wanted

    right, disk = Reader.fill, MemoryDisk()

    def wrong(self: Reader, wanted: Wanted, lo: int, out: torch.Tensor) -> None:
        right(self, wanted, max(0, lo + shift * (out.numel() > 1)), out)

    saved(a_plan(), 3, disk)
    monkeypatch.setattr(Reader, "fill", wrong)
    with pytest.raises(AssertionError, match="is another"):
        is_the_state(a_plan(Mesh(edp=4), dict.fromkeys(a_plan().rules, zero3("edp"))), 3, disk)


@given(cases(), st.integers(0, 9))
def test_of_all_copies_every_entry_is_written_once(case: Any, turn: int) -> None:
    from sharding.gather import Layout

    layout = Layout(case.rule, case.mesh, case.shape, torch.float64)
    pieces = sorted(share(layout, rank, 8, turn) for rank in case.mesh)
    end = 0
    for lo, hi in pieces:
        if lo < hi:
            assert lo == end
            end = hi
    assert end == torch.Size(case.shape).numel()


def test_copies_share_the_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SHARE", 2**16)
    params, mesh = {str(i): torch.zeros(2**i) for i in range(8, 18)}, Mesh(edp=4)
    plan = make_plan(params, dict.fromkeys(params, "x"), {"x": replicated()}, mesh)
    sizes: list[int] = []

    def program(comm: Comm) -> None:
        state = state_of(plan, comm.rank, 0, moments=())
        mine = parts.parts_of(state, plan, comm)
        sizes.append(sum(part.x.numel() for part in mine))

    simulate(program, mesh)
    total = sum(x.numel() for x in params.values())
    assert sum(sizes) == total and max(sizes) < 0.4 * total and min(sizes) > 0.1 * total


def test_real_ranks_write_what_simulated_ones_read(ranks4: Farm, tmp_path: Path) -> None:
    plan, there = a_plan(), tmp_path / "real"
    found = ranks4.run(on_real_ranks, plan.mesh, [plan] * 4, [there] * 4)
    assert found == [True] * 4 and verify(there).problems == ()
    for rank, state in enumerate(restored(plan, DISK, there)):
        assert same(state, state_of(plan, rank, 3))


def on_real_ranks(comm: Comm, plan: Plan, path: Path) -> bool:
    state = state_of(plan, comm.rank, 3)
    save(path, state, plan, comm)
    return same(restore(path, plan, comm), state)


# -- resume = never stopped ------------------------------------------------------------------------

CFG = lm.Config(vocab=11, dim=8, layers=1, heads=2, experts=4, top_k=2, ffn=8)
HERE = Mesh(edp=2, ep=2)
MESHES = {
    HERE: {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))},
    Mesh(edp=1, ep=1): {"dense": replicated(), "expert": replicated()},
    Mesh(ep=4): {"dense": zero3("ep"), "expert": expert_parallel("ep")},
    Mesh(edp=3): {"dense": zero3("edp"), "expert": zero3("edp")},
}


def run(
    comm: Comm, steps: int, path: Path | None, load: bool, donate: bool
) -> tuple[State, list[Any]]:
    """Train from the beginning, or from a checkpoint, up to a step."""
    params = lm.init(CFG, seed=0, dtype=torch.float64)
    plan = make_plan(params, lm.labels, MESHES[comm.mesh], comm.mesh)
    tx = adamw(cosine(1e-2, warmup=2, total=9))
    step = make_train_step(lm.loss(CFG, plan, comm), plan, tx, comm, clip=0.5, donate=donate)
    if load:
        assert path is not None
        state = restore(path, plan, comm)
    else:
        state = init_state(plan.shard(params, comm), plan, tx)
    while int(state.step) < steps:
        stream = torch.Generator().manual_seed(int(state.step))
        ids = torch.randint(0, CFG.vocab, (12, 6), generator=stream)
        ids = ids.tensor_split(comm.mesh.size)[comm.rank]
        state, _ = step(state, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    if path is not None and not load:
        save(path, state, plan, comm)
    return state, flatten(plan.full(state.params, comm))[0]


@pytest.mark.parametrize("donate", [False, True], ids=["", "donated"])
def test_a_resumed_run_is_the_run_that_never_stopped(donate: bool, tmp_path: Path) -> None:
    def ranks(steps: int, path: Path | None, load: bool, mesh: Mesh = HERE) -> Any:
        n = mesh.size
        return simulate(run, mesh, *([x] * n for x in (steps, path, load, donate)))

    whole = ranks(5, None, False)
    ranks(2, tmp_path / "at2", False)
    for (found, _), (expected, _) in zip(ranks(5, tmp_path / "at2", True), whole, strict=True):
        assert same(found, expected)
    for mesh in MESHES:
        for _, params in ranks(5, tmp_path / "at2", True, mesh):
            for x, y in zip(params, whole[0][1], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    one_more = ranks(6, None, False)[0]
    assert not same(one_more[1], whole[0][1]), "a step more must be seen"


# -- what is in it ---------------------------------------------------------------------------------


def test_contents_say_all_but_the_mesh(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("{}")
    files = {"tokenizer.json": tmp_path / "tokens.json", "notes": b"hello"}
    path = tmp_path / "checkpoint"
    saved(a_plan(), 3, DISK, path, metadata={"recipe": [1, 2.5, None, "é"]}, files=files)
    contents = describe(path)
    assert contents == verify(path) and contents.problems == ()
    assert contents.step == 3 and contents.metadata == {"recipe": [1, 2.5, None, "é"]}
    assert contents.files == {"tokenizer.json": 2, "notes": 5} and "torch 2" in contents.code
    leaves = {leaf.path: leaf for leaf in contents.leaves}
    assert leaves["w"][1:] == ("expert", (4, 3), torch.float64, False, ("m", "v"))
    assert leaves["kept"].frozen and leaves["kept"].moments == ()
    assert attached(path, "notes") == b"hello" and attached(path, "tokenizer.json") == b"{}"
    text = (path / "manifest.json").read_text()
    assert not any(word in text for word in ("edp", '"ep"', "mesh", "world", "rule"))
    table = str(contents)
    assert "step 3, 5 leaves of 25 entries" in table and "4x3     float64   m v" in table


def test_a_payload_is_a_safetensors_file_of_intervals(tmp_path: Path) -> None:
    saved(a_plan(), 3, DISK, tmp_path)
    found: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        assert not found.keys() & load_file(file).keys()
        found |= load_file(file)
    pieces = {
        f"{role}/{entry.path}[{piece.lo}:{piece.hi}]": piece.hi - piece.lo
        for entry in read_manifest(tmp_path, DISK).leaves
        for role, stored in entry.tensors.items()
        for piece in stored.pieces
    }
    assert {name: x.numel() for name, x in found.items()} == pieces
    state = state_of(alone(), 0, 3)
    for name, x in found.items():
        role, rest = name.split("/")
        leaf, ends = rest[:-1].split("[")
        lo, hi = map(int, ends.split(":"))
        whole = state.params[leaf] if role == "params" else state.opt[LABEL[leaf]][role][leaf]
        assert torch.equal(x, whole[lo:hi])


LABEL = {leaf.path: leaf.label for leaf in a_plan().leaves}


def test_parameters_alone_can_be_restored_and_dtypes_converted() -> None:
    disk = MemoryDisk()
    saved(a_plan(), 3, disk)
    wide = {leaf.path: torch.empty(leaf.shape, dtype=torch.float32) for leaf in a_plan().leaves}
    plan = make_plan(wide, dict.fromkeys(wide, "x"), {"x": zero3("ep")}, Mesh(ep=3))

    def program(comm: Comm) -> Any:
        return restore_params(ROOT, plan, comm, cast=True, disk=disk)

    for rank, found in enumerate(simulate(program, plan.mesh)):
        expected = state_of(a_plan(), 0, 3)
        assert found["w"].dtype == torch.float32 and found["w"].shape == (4,)
        whole = state_of(alone(), 0, 3).params["w"].float()
        assert torch.equal(found["w"], whole[4 * rank : 4 * rank + 4]) and expected

    labels = dict.fromkeys(wide, "x") | {"kept": "still"}
    rules = {"x": replicated(), "still": replicated()}
    plan = make_plan(wide, labels, rules, Mesh(), frozen=("still",))
    (state,) = simulate(lambda comm: restore(ROOT, plan, comm, cast=True, disk=disk), Mesh())
    assert state.opt["x"]["v"]["w"].dtype == torch.float32
    assert torch.equal(state.opt["x"]["v"]["w"], state_of(alone(), 0, 3).opt["expert"]["v"]["w"])


def test_a_manifest_is_json_that_anyone_can_read(tmp_path: Path) -> None:
    saved(a_plan(), 3, DISK, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == "functional-ep checkpoint" and manifest["version"] == 1
    assert sorted(manifest["payloads"]) == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert MESH.size == sum(name.startswith("rank-") for name in manifest["payloads"])
