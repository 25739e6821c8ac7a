"""Replay: a recorded rank runs its step again, alone, to the bit; two recordings are compared."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from budget import one_in
from farm import Farm
from faults import FAULTS, MESH, Arena, Place, flip
from hypothesis import given
from hypothesis import strategies as st
from laws import uneven
from test_vote import copy_of, same
from torch import Tensor

from functional_ep import (
    Difference,
    State,
    Vetoed,
    Vote,
    bisect,
    init_state,
    make_train_step,
    record,
    replay,
    sgd,
)
from functional_ep.recordings.file import ABOUT, TENSORS, folder_of, read_about
from functional_ep.recordings.trees import describe, rebuild
from functional_ep.sealed import seal
from functional_ep.testing import Chosen, Training, prepare, trainings
from sharding import Comm, Divergence, Mesh, make_plan, sharded, simulate, tape, zero3
from sharding.comm import Done, Op, Then, Work

Steps = list[tuple[State, dict[str, Tensor]]]


def run(comm: Comm, case: Training, directory: str, steps: Any = None) -> Steps:
    """A training; what each step returned. Recorded if there is a directory."""
    _, state, step = prepare(comm, case)
    if directory:
        step = record(step, comm, directory, steps)
    seen: Steps = []
    for micros in case.batches(comm.rank):
        state, metrics = step(state, *micros)
        seen.append((copy_of(state), metrics))
    return seen


def record_all(case: Training, directory: str, **options: Any) -> list[Steps]:
    n = case.mesh.size
    return simulate(
        run, case.mesh, [case] * n, [directory] * n, *([v] * n for v in options.values())
    )


def program_of(case: Training) -> Callable[[Comm], Any]:
    return lambda comm: prepare(comm, case)[2]


# -- the law -------------------------------------------------------------------------------------


@one_in(6)
@given(case=trainings(max_ranks=4), votes=st.booleans())
def test_every_rank_replays_alone_and_recording_changes_no_bit(case: Training, votes: bool) -> None:
    case = replace(case, commit=Vote() if votes else None)
    with TemporaryDirectory() as directory:
        plain, recorded = record_all(case, ""), record_all(case, directory)
        for rank, steps in enumerate(recorded):
            assert same(steps, plain[rank])
            for number, (state, metrics) in enumerate(steps):
                again = replay(folder_of(directory, rank, number), program_of(case))
                assert same(again, (state, metrics))


def replays(case: Training) -> None:
    with TemporaryDirectory() as directory:
        for rank, steps in enumerate(record_all(case, directory)):
            for number, expected in enumerate(steps):
                again = replay(folder_of(directory, rank, number), program_of(case))
                assert same(again, expected)


def results_that_change_later(patch: pytest.MonkeyPatch) -> None:
    def wait(self: Any) -> list[Tensor]:
        self.heard.received = self.work.wait()
        return self.heard.received

    patch.setattr(tape._Kept, "wait", wait)


def numbered_as_they_are_awaited(patch: pytest.MonkeyPatch) -> None:
    right = tape._Kept.wait

    def call(self: tape.Tape, op: Op, xs: Sequence[Tensor], work: Work) -> Work:
        heard = tape.Heard(tape.asked(op, xs), self.digest(xs))

        def arrived(ys: list[Tensor]) -> list[Tensor]:
            self.heard.append(heard)
            return right(tape._Kept(Done(ys), heard))

        return Then(work, arrived)

    patch.setattr(tape.Tape, "__call__", call)


def a_state_that_is_overwritten(patch: pytest.MonkeyPatch) -> None:
    module: Any = sys.modules["functional_ep.recordings.record"]
    patch.setattr(module, "_copy", lambda x: x.detach())


WRONG = [results_that_change_later, numbered_as_they_are_awaited, a_state_that_is_overwritten]


@pytest.mark.parametrize("plant", WRONG)
def test_a_wrong_recording_does_not_replay(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = replace(uneven().cfg, layers=2)
    case = replace(uneven(expert=Chosen("adamw")), cfg=dense, donate=True)
    replays(case)
    plant(monkeypatch)
    with pytest.raises((AssertionError, Divergence, ValueError)):
        replays(case)


def test_real_ranks_replay_here(ranks2: Farm, tmp_path: Path) -> None:
    case = replace(uneven(), mesh=Mesh(edp=1, ep=2), backward="recompute")
    case = replace(case, sizes=((((2, 3), (0, 1)),),) * 2, donate=True, commit=Vote())
    seen = ranks2.run(run, case.mesh, [case] * 2, [str(tmp_path)] * 2)
    for rank, steps in enumerate(seen):
        for number, expected in enumerate(steps):
            assert same(replay(folder_of(tmp_path, rank, number), program_of(case)), expected)


def test_only_the_steps_that_are_asked_for(tmp_path: Path) -> None:
    record_all(uneven(), str(tmp_path), steps=range(1, 2))
    assert sorted(x.name for x in tmp_path.glob("rank-00002/*")) == ["step-00000001"]


def test_random_numbers_and_strides_are_part_of_it(tmp_path: Path) -> None:
    """Dropout, an expanded batch, one the other way round in memory, and windows that slide."""

    def step(state: State, x: Tensor, y: Tensor, z: Tensor) -> tuple[State, dict[str, Tensor]]:
        seen = torch.rand(3) + x[0, 0] + z.sum()
        strides = torch.tensor(x.stride() + y.stride())
        return state, {"seen": seen, "strides": strides, "product": y @ y.T}

    def program(comm: Comm) -> Any:
        windows = torch.arange(8.0).unfold(0, 3, 1)  # sums are exact in any order
        batch = torch.ones(3, 1).expand(3, 4), torch.rand(4, 3).T, windows
        return record(step, comm, tmp_path)(State(torch.tensor(5), {}, {}), *batch)

    for rank, expected in enumerate(simulate(program, MESH)):
        torch.rand(7)  # elsewhere the stream stands elsewhere
        assert same(replay(folder_of(tmp_path, rank, 5), lambda comm: step), expected)


def test_a_step_that_ends_with_an_error_ends_with_it_again(tmp_path: Path) -> None:
    place = Place(FAULTS[0], 2, 0)

    def program(comm: Comm) -> str:
        arena = Arena(comm, Vote("raise"), place, False)
        arena.step = record(arena.step, comm, tmp_path)
        with pytest.raises(Vetoed) as raised:
            arena.take(0)
        return str(raised.value)

    said = simulate(program, MESH)
    with pytest.raises(Vetoed) as raised:
        replay(folder_of(tmp_path, 2, 0), lambda comm: Arena(comm, Vote(), place, False).step)
    assert str(raised.value) == said[2]
    with pytest.raises(Divergence, match=r"step 0: in the recording it ended with Vetoed"):
        replay(folder_of(tmp_path, 2, 0), lambda comm: Arena(comm, Vote("skip"), place, False).step)


@pytest.mark.parametrize("donate", [False, True])
def test_a_recording_that_cannot_be_written_costs_no_state(tmp_path: Path, donate: bool) -> None:
    def program(comm: Comm) -> None:
        loss = sharded(lambda view, x: ((view["w"] * x["x"].abs()).sum(), 1), plan, comm)
        step = make_train_step(loss, plan, sgd(0.1), comm, donate=donate)
        state = init_state(plan.shard(params, comm), plan, sgd(0.1))
        recorded = record(step, comm, tmp_path / "run")
        with pytest.raises(ValueError, match=r"batches/0/x \(torch.complex64\): this dtype"):
            recorded(state, {"x": torch.ones(2, dtype=torch.complex64)})
        assert state.step.numel() == 1, "refused before the step, which was to write into it"
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("in the way")
        with pytest.warns(UserWarning, match="there is no recording of step 0: "):
            state, _ = recorded(state, {"x": torch.ones(2)})
        assert torch.equal(state.params["w"], torch.full((2,), 0.9))
        with pytest.raises(ValueError, match="no batch") as raised:
            recorded(state)
        assert any("no recording of step 1" in note for note in raised.value.__notes__)
        with pytest.raises(OSError):
            record(step, comm, tmp_path / "run" / "below")

    params = {"w": torch.ones(2)}
    plan = make_plan(params, {"w": "dense"}, {"dense": zero3("edp")}, Mesh(edp=1))
    simulate(program, plan.mesh)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(3)], ids=["^C", "exit"])
def test_a_step_that_was_interrupted_does_not_look_finished(
    tmp_path: Path, stop: BaseException
) -> None:
    def step(state: State, x: Tensor) -> tuple[State, dict[str, Tensor]]:
        return state, {"x": x}

    def interrupted(state: State, x: Tensor) -> tuple[State, dict[str, Tensor]]:
        raise stop

    def program(comm: Comm, inner: Any, run: Path) -> None:
        recorded = record(inner, comm, run)
        given = State(torch.tensor(5), {}, {}), torch.ones(2)
        if inner is step:
            recorded(*given)
        else:
            with pytest.raises(type(stop)):
                recorded(*given)

    for name, inner in {"a": step, "b": interrupted}.items():
        simulate(program, Mesh(edp=1), [inner], [tmp_path / name])
    said = f"SystemExit: {stop}" if isinstance(stop, SystemExit) else "KeyboardInterrupt"
    about = read_about(folder_of(tmp_path / "b", 0, 5))
    assert (about.ended, about.result) == (said, {})
    assert read_about(folder_of(tmp_path / "a", 0, 5)).ended == ""
    with pytest.raises(Divergence, match=f"ended with {said}. Here it did not"):
        replay(folder_of(tmp_path / "b", 0, 5), lambda comm: step)
    assert re.search(f"the end \\(none; {said}\\)", str(bisect(tmp_path / "a", tmp_path / "b")))


# -- two runs ------------------------------------------------------------------------------------


def struck(comm: Comm, directory: str, at: tuple[int, int, str]) -> None:
    """A training in which one rank's step gets another token, or receives another bit."""
    case = replace(uneven(), sizes=((((1, 2), (2, 3), (1, 2), (1, 2)),),) * 3)
    rank, when, kind = at
    _, state, step = prepare(comm, case)
    step = record(step, comm, directory)
    for number, (batch,) in enumerate(case.batches(comm.rank)):
        mine = (comm.rank, number) == (rank, when)
        if mine and kind == "token":
            batch = batch | {"input_ids": (batch["input_ids"] + 1) % case.cfg.vocab}
        asked: list[Op] = []

        def listener(
            op: Op, xs: Sequence[Tensor], work: Work, asked: list[Op] = asked, mine: bool = mine
        ) -> Work:
            asked.append(op)
            if mine and kind == "bit" and len(asked) == 5:
                return Then(
                    work, lambda ys: [*ys[:-1], flip(ys[-1].reshape(-1)).view(ys[-1].shape)]
                )
            return work

        with comm.heard_by(listener):
            state, _ = step(state, batch)


@pytest.mark.parametrize(
    ("rank", "step", "kind", "what"),
    [
        (2, 1, "token", r"batches\[0\]\['input_ids'\]"),
        (1, 2, "token", r"batches\[0\]\['input_ids'\]"),
        (3, 1, "bit", r"tensor \d+ received from collective no\. 4, "),
        (0, 0, "bit", r"tensor \d+ received from collective no\. 4, "),
    ],
)
def test_bisect_finds_where_two_runs_part(
    rank: int, step: int, kind: str, what: str, tmp_path: Path
) -> None:
    runs = [str(tmp_path / name) for name in "ab"]
    for directory, at in zip(runs, [(-1, 0, ""), (rank, step, kind)], strict=True):
        simulate(struck, uneven().mesh, [directory] * 4, [at] * 4)
    found = bisect(*runs)
    assert isinstance(found, Difference)
    assert (found.step, found.rank) == (step, rank)
    assert found.collective == (None if kind == "token" else 4)
    said = rf"step {step}, rank {rank}: {what}.* differs: \d+ of \d+ numbers, the first at"
    assert re.match(said, str(found)), str(found)
    assert bisect(runs[0], runs[0]) is None


def test_a_recording_that_a_crash_cut_short_is_none(tmp_path: Path) -> None:
    record_all(uneven(), str(tmp_path), steps=(0,))
    whole = folder_of(tmp_path, 1, 0)
    shutil.copytree(whole, whole.with_suffix(".part"))
    assert bisect(tmp_path, tmp_path) is None
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match="no recordings"):
        for rank in (0, 2, 3):
            shutil.rmtree(folder_of(tmp_path, rank, 0))
        bisect(tmp_path, tmp_path)


def test_bisect_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    record_all(uneven(), str(tmp_path / "a"), steps=(0,))
    record_all(uneven(), str(tmp_path / "b"), steps=(1,))
    with pytest.raises(ValueError, match="no step of a rank in common"):
        bisect(tmp_path / "a", tmp_path / "b")
    other = uneven().on(Mesh(edp=4, ep=2))
    record_all(other, str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"is of Mesh\(edp=2, ep=2\), .* of Mesh\(edp=4, ep=2\)"):
        bisect(tmp_path / "a", tmp_path / "c")


# -- refused -------------------------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Rank 1 in step 0 of two by two ranks."""
    record_all(uneven(), str(tmp_path), steps=(0,))
    return folder_of(tmp_path, 1, 0)


def edited(path: Path, **changes: Any) -> None:
    about = json.loads((path / ABOUT).read_text())
    del about["digest"]
    (path / ABOUT).write_bytes(seal(about | changes))


def test_what_is_no_recording_is_refused(recording: Path) -> None:
    program = program_of(uneven())
    with pytest.raises(ValueError, match=r"is no recording: it has no recording\.json"):
        replay(recording.parent, program)
    for version, what in ((3, "up to 2: update"), (1, "from 2 on: use the functional-ep that")):
        edited(recording, version=version)
        message = rf"recording\.json has format version {version}; this code reads versions {what}"
        with pytest.raises(ValueError, match=message):
            replay(recording, program)
    for version in ("2", None, True, 0, 1.0, [1]):
        edited(recording, version=version)
        said = re.escape(f"its version is {version!r}")
        with pytest.raises(ValueError, match=rf"recording\.json is damaged, or no .*: {said}"):
            replay(recording, program)
    edited(recording, format="cake", version=2)
    with pytest.raises(ValueError, match="or no functional-ep recording: it is a 'cake'"):
        replay(recording, program)
    edited(recording, format="functional-ep recording", more=1)
    with pytest.raises(ValueError, match=r"is damaged.*'more'"):
        replay(recording, program)
    (recording / ABOUT).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        replay(recording, program)


def test_whatever_bit_flips_in_what_it_says_is_found(tmp_path: Path) -> None:
    def step(state: State, x: Tensor, rate: float) -> tuple[State, dict[str, Tensor]]:
        return state, {"x": x * rate}

    def program(comm: Comm) -> Any:
        return record(step, comm, tmp_path)(State(torch.tensor(5), {}, {}), torch.ones(2), 0.5)

    (expected,) = simulate(program, Mesh(edp=1))
    folder, random = folder_of(tmp_path, 0, 5), Random(5)
    whole = (folder / ABOUT).read_bytes()
    assert same(replay(folder, lambda comm: step), expected)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << random.randrange(8)
        (folder / ABOUT).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"recording\.json (is damaged, or no|has format)"):
            read_about(folder)
    for length in range(len(whole)):
        (folder / ABOUT).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"recording\.json is damaged, or no"):
            read_about(folder)
    edited_without_a_seal = whole.replace(b'"value":0.5', b'"value":0.7')
    assert edited_without_a_seal != whole
    (folder / ABOUT).write_bytes(edited_without_a_seal)
    with pytest.raises(ValueError, match=r"its text and its digest disagree"):
        replay(folder, lambda comm: step)


def test_a_flipped_bit_in_the_file_is_found(recording: Path) -> None:
    path = recording / TENSORS
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 4
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"is damaged: its digest is not that"):
        replay(recording, program_of(uneven()))


class Other(NamedTuple):
    """Another program than the recorded one, and what is said of it."""

    case: Training
    message: str


@pytest.mark.parametrize(
    "other",
    [
        Other(
            replace(uneven(), rules={**uneven().rules, "expert": uneven().rules["dense"]}), "asks"
        ),
        Other(replace(uneven(), commit=Vote()), "asks for"),
        Other(replace(uneven(), clip=1e-3), r"step 0: state\.?.*differ from the recorded ones"),
        Other(
            uneven(balance=0.5),
            r"step 0: collective no\. \d+, .* is sent other numbers than it was",
        ),
    ],
)
def test_another_program_is_told_where_it_parts(recording: Path, other: Other) -> None:
    with pytest.raises((Divergence, ValueError), match=other.message):
        replay(recording, program_of(other.case))


def test_collectives_before_after_and_too_few(recording: Path) -> None:
    case = uneven()

    def early(comm: Comm) -> Any:
        comm.all_reduce([torch.ones(1)], comm.mesh.axes)

    def idle(comm: Comm) -> Any:
        return lambda state, *batches: (state, {})

    def more(comm: Comm) -> Any:
        step = prepare(comm, case)[2]

        def longer(state: State, *batches: Any) -> Any:
            result = step(state, *batches)
            comm.all_reduce([torch.ones(1)], comm.mesh.axes)
            return result

        return longer

    for program, message in [
        (early, "before the recorded step: rank 1 is alone here"),
        (idle, r"the program has ended before collective no\. 0"),
        (more, r"is asked for, but the recording ends after \d+"),
    ]:
        with pytest.raises(Divergence, match=message):
            replay(recording, program)


# -- trees ---------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.lists(st.integers(0, 9), max_size=3).map(torch.tensor),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers(0, 3)), inner, max_size=3),
        st.tuples(LEAVES, inner).map(lambda pair: Leafy(*pair)),
    ),
    max_leaves=8,
)


class Leafy(NamedTuple):
    """A NamedTuple of this module."""

    first: Any
    second: Any


@given(TREES)
def test_a_tree_comes_back_from_json(tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    node = json.loads(json.dumps(describe(tree, "tree", tensors), allow_nan=False))
    again = rebuild(node, tensors)
    kept: dict[str, Tensor] = {}
    assert json.dumps(describe(again, "tree", kept)) == json.dumps(node)
    assert type(again) is type(tree) and list(kept) == list(tensors)
    assert all(kept[name] is tensors[name] for name in kept)


def test_what_json_cannot_hold_is_refused_by_its_path() -> None:
    with pytest.raises(ValueError, match=r"batches/0/x: a set cannot be recorded"):
        describe([{"x": {1}}], "batches", {})
    with pytest.raises(ValueError, match=r"batches: keys \[\(1,\)\] cannot be recorded"):
        describe({(1,): 2}, "batches", {})
    with pytest.raises(ValueError, match="NamedTuple nowhere:Thing: import nowhere first"):
        rebuild({"named": "nowhere:Thing", "items": []}, {})
