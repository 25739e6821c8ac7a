"""Bad input gets one clear error on all ranks, and changes nothing on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from states import LABELS, PARAMS, RULES, a_plan, same, state_of

from functional_ep import State, adamw, init_state, restore, restore_params, save, sgd
from functional_ep.checkpoint import attached, describe, verify
from functional_ep.checkpoint.disk import Disk
from functional_ep.sealed import seal
from sharding import Comm, Mesh, Plan, make_plan, replicated, simulate, zero3

MESH = Mesh(edp=1, ep=2)
PLAN = a_plan(MESH)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint."""
    path = tmp_path / "checkpoint"
    simulate(lambda comm: save(path, state_of(PLAN, comm.rank, 3), PLAN, comm), MESH)
    return path


def contents(path: Path) -> dict[str, bytes]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def refuses(mesh: Mesh, kind: type[Exception], message: str, act: Callable[[Comm], Any]) -> None:
    """Every rank raises the same."""

    def program(comm: Comm) -> str:
        with pytest.raises(kind, match=message) as caught:
            act(comm)
        return str(caught.value)

    assert len(set(simulate(program, mesh))) == 1


def refuses_to_restore(path: Path, plan: Plan, kind: type[Exception], message: str) -> None:
    before = contents(path) if path.is_dir() else {}
    refuses(plan.mesh, kind, message, lambda comm: restore(path, plan, comm))
    assert not before or contents(path) == before


# -- what is no checkpoint -------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_said_with_what_it_is(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, files, message in (
        ("nowhere", None, "there is no such directory"),
        ("file", None, "it is a file"),
        ("empty", [], "it has no manifest.json"),
        ("hf", ["config.json", "model.safetensors"], r"read it with from_huggingface\(path\)"),
        ("dcp", [".metadata", "__0_0.distcp"], r"checkpoint wrote it: .*dcp reads that"),
        ("cut", [f"rank-00000-{'0' * 32}.safetensors"], "ended before it was complete"),
        ("runs", ["step-00000003/manifest.json", "step-00000010/manifest.json"], "step-00000010"),
    ):
        for file in files or ():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("x")
        if files == []:
            (tmp_path / name).mkdir()
        refuses_to_restore(
            tmp_path / name, PLAN, FileNotFoundError, f"is no checkpoint: .*{message}"
        )
        with pytest.raises(FileNotFoundError, match=message):
            describe(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"has no file 'x': it has \[\]"):
        attached(path, "x")


def test_a_checkpoint_from_the_future_is_not_read_or_written_over(path: Path) -> None:
    manifest = path / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["digest"]
    body["version"] = 2
    manifest.write_bytes(seal(body))
    message = r"format version 2, written by functional-ep .* up to 1: update functional-ep"
    refuses_to_restore(path, PLAN, ValueError, message)
    before = contents(path)
    refuses(MESH, ValueError, message, lambda c: save(path, state_of(PLAN, c.rank, 4), PLAN, c))
    assert contents(path) == before


# -- what does not fit -----------------------------------------------------------------------------


def other(params: dict[str, torch.Tensor], frozen: tuple[str, ...] = ("still",)) -> Plan:
    labels = {name: LABELS.get(name, "dense") for name in params}
    used = {label: RULES[label] for label in RULES if label in labels.values()}
    return make_plan(params, labels, used, MESH, frozen=frozen)


def test_other_leaves_shapes_and_dtypes_are_refused(path: Path) -> None:
    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: x for key, x in PARAMS.items() if key != name}

    renamed = other({**without("none"), "nine": PARAMS["none"]})
    message = r"it lacks \['nine'\]; it has, and the plan lacks, \['none'\]. nine may be none"
    refuses_to_restore(path, renamed, ValueError, message)
    message = r"lacks nothing; it has, and the plan lacks, \['b'\]$"
    refuses_to_restore(path, other(without("b")), ValueError, message)
    many = other({**PARAMS, **{f"x{i:02}": torch.empty(1) for i in range(20)}})
    message = r"lacks \['x00', .*'x07'\] and 12 more; .*the plan lacks, nothing"
    refuses_to_restore(path, many, ValueError, message)
    wider = other({**PARAMS, "w": torch.empty(4, 4, dtype=torch.float64)})
    message = r"params\['w'\] \(4, 4\) expected, but \(4, 3\) was saved"
    refuses_to_restore(path, wider, ValueError, message)
    narrow = other({**PARAMS, "w": torch.empty(4, 3)})
    message = r"\(4, 3\) torch.float32 expected, but torch.float64 was saved: .*with cast=True"
    refuses_to_restore(path, narrow, ValueError, message)


def test_a_leaf_that_was_frozen_has_no_moments_to_go_on_with(path: Path) -> None:
    refuses_to_restore(path, other(PARAMS, frozen=()), ValueError, "'kept' was frozen and has no")
    plan = other(PARAMS, frozen=())
    found = simulate(lambda comm: restore_params(path, plan, comm), MESH)
    assert same(found[1], state_of(PLAN, 1, 3).params)


def test_leaves_with_different_moments_do_not_share_a_label(tmp_path: Path) -> None:
    params = {"v": torch.zeros(4), "w": torch.zeros(4)}
    rules = {"a": zero3("ep"), "b": zero3("ep")}
    apart = make_plan(params, {"v": "a", "w": "b"}, rules, Mesh(ep=2))
    together = make_plan(params, dict.fromkeys(params, "a"), {"a": zero3("ep")}, Mesh(ep=2))

    def program(comm: Comm) -> None:
        optimizers = {"a": adamw(1.0), "b": sgd(1.0)}
        save(tmp_path, init_state(apart.shard(params, comm), apart, optimizers), apart, comm)

    simulate(program, apart.mesh)
    message = r"label 'a': 'v' has the moments \['m', 'v'\] and 'w' has \[\]"
    refuses_to_restore(tmp_path, together, ValueError, message)
    found = simulate(lambda comm: restore(tmp_path, apart, comm), apart.mesh)[0]
    assert found.opt["b"] == {} and set(found.opt["a"]) == {"m", "v"}


def test_ranks_that_see_other_directories_are_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    simulate(lambda comm: save(other, state_of(PLAN, comm.rank, 4), PLAN, comm), MESH)
    paths = [path, other]
    message = "the checkpoint differs between ranks.* rank 0 has .*step 3.* rank 1 has .*step 4"
    refuses(MESH, ValueError, message, lambda comm: restore(paths[comm.rank], PLAN, comm))


# -- what cannot be saved --------------------------------------------------------------------------


def states(change: Callable[[State, int], Any]) -> Callable[[Path, Comm], None]:
    def act(path: Path, comm: Comm) -> None:
        save(path, change(state_of(PLAN, comm.rank, 4), comm.rank), PLAN, comm)

    return act


def with_moment(state: State, name: str, x: torch.Tensor | None) -> State:
    moments = dict(state.opt["expert"][name])
    if x is None:
        del moments["w"]
    else:
        moments["w"] = x
    return state._replace(opt={**state.opt, "expert": {**state.opt["expert"], name: moments}})


def renamed_moment(state: State, old: str, new: str) -> State:
    moments = {new if name == old else name: its for name, its in state.opt["expert"].items()}
    return state._replace(opt={**state.opt, "expert": moments})


def donated(state: State, rank: int) -> State:
    state.step.set_()  # pyright: ignore[reportCallIssue]
    return state


WRONG: dict[str, tuple[Callable[[Path, Comm], None], type[Exception], str]] = {
    "params": (states(lambda s, r: s.params), ValueError, "a State is saved, not dict"),
    "donated": (states(donated), ValueError, "was donated to a step: save the one that"),
    "steps": (
        states(lambda s, r: s._replace(step=torch.tensor(r))),
        ValueError,
        "the state to save differs between ranks.*step 0",
    ),
    "labels": (
        states(lambda s, r: s._replace(opt={})),
        ValueError,
        r"optimizer states for \[\], but the plan trains \['dense', 'expert'\]",
    ),
    "no moment": (
        states(lambda s, r: with_moment(s, "m", None)),
        ValueError,
        r"state.opt\['expert'\]\['m'\]\['w'\] is missing or left over",
    ),
    "one rank's moment": (
        states(lambda s, r: with_moment(s, "v", torch.zeros(6 + r))),
        ValueError,
        r"rank 1: moment 'v' of params\['w'\]: a shard \(6,\) .* found \(7,\)",
    ),
    "dtype": (
        states(lambda s, r: with_moment(s, "v", torch.zeros(6, dtype=torch.complex64))),
        ValueError,
        "complex64, which a safetensors file cannot hold",
    ),
    "the parameter's name": (
        states(lambda s, r: renamed_moment(s, "m", "params")),
        ValueError,
        r"state.opt\['expert'\]\['params'\]: a moment cannot be saved as 'params'",
    ),
    "a path in a name": (
        states(lambda s, r: renamed_moment(s, "v", "v/b")),
        ValueError,
        r"state.opt\['expert'\]\['v/b'\]: .* nor with a '/', .* call it something else",
    ),
    "metadata": (
        lambda path, comm: save(
            path, state_of(PLAN, comm.rank, 4), PLAN, comm, metadata={"x": {1, 2}}
        ),
        TypeError,
        "metadata is written as JSON, which cannot say it",
    ),
    "nan": (
        lambda path, comm: save(
            path, state_of(PLAN, comm.rank, 4), PLAN, comm, metadata=float("nan")
        ),
        TypeError,
        "metadata is written as JSON, which cannot say it",
    ),
    "keys": (
        lambda path, comm: save(
            path, state_of(PLAN, comm.rank, 4), PLAN, comm, metadata={"x": {1: "a", "1": "b"}}
        ),
        TypeError,
        "two keys of one dict that are the same in JSON",
    ),
    "a file's name": (
        lambda path, comm: save(
            path, state_of(PLAN, comm.rank, 4), PLAN, comm, files={"../x": b""}
        ),
        ValueError,
        r"files\['../x'\]: a plain file name is needed",
    ),
    "a file": (
        lambda path, comm: save(
            path, state_of(PLAN, comm.rank, 4), PLAN, comm, files={"x": path / "nowhere"}
        ),
        FileNotFoundError,
        "rank 0: No such file or directory",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_saved_changes_nothing(name: str, path: Path, tmp_path: Path) -> None:
    act, kind, message = WRONG[name]
    before = contents(path)
    refuses(MESH, kind, f"(?s){message}", lambda comm: act(path, comm))
    assert contents(path) == before
    fresh = tmp_path / "fresh"
    refuses(MESH, kind, f"(?s){message}", lambda comm: act(fresh, comm))
    assert not fresh.exists()


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for name, files in (("web", ["index.html"]), ("extension", [])):
        (tmp_path / name).mkdir()
        for file in ["manifest.json", *files]:
            (tmp_path / name / file).write_text('{"name": "mine"}')
    before = contents(tmp_path)
    for name, message in (
        ("file", "is a file"),
        ("full", "is no checkpoint, it holds thesis.tex"),
        ("web", "is no checkpoint, it holds index.html"),
        ("extension", r"is no checkpoint, it holds manifest\.json"),
    ):
        refuses(
            MESH,
            FileExistsError,
            message,
            lambda c, name=name: save(tmp_path / name, state_of(PLAN, c.rank, 4), PLAN, c),
        )
    assert contents(tmp_path) == before


def test_files_beside_a_checkpoint_stay(path: Path) -> None:
    (path / "notes.txt").write_text("mine")
    simulate(lambda comm: save(path, state_of(PLAN, comm.rank, 4), PLAN, comm), MESH)
    assert (path / "notes.txt").read_text() == "mine" and not verify(path).problems
    assert len(list(path.iterdir())) == 6


def test_a_damaged_checkpoint_can_be_saved_over(path: Path) -> None:
    (path / "manifest.json").write_text("{}")
    (path / "notes.txt").write_text("mine")
    simulate(lambda comm: save(path, state_of(PLAN, comm.rank, 4), PLAN, comm), MESH)
    assert describe(path).step == 4 and not verify(path).problems


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_an_error_on_all_ranks(path: Path) -> None:
    before = contents(path)
    path.chmod(0o555)
    try:
        act = lambda c: save(path, state_of(PLAN, c.rank, 4), PLAN, c)  # noqa: E731
        refuses(MESH, PermissionError, "rank 0: Permission denied", act)
    finally:
        path.chmod(0o755)
    assert contents(path) == before


def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    class Full(Disk):
        def write(self, file: int, memory: memoryview) -> None:
            raise OSError(28, "No space left on device")

    refuses(
        MESH,
        OSError,
        r"No space left on device: '.*/\.frozen-00000\.incomplete'",
        lambda c: save(tmp_path / "x", state_of(PLAN, c.rank, 4), PLAN, c, disk=Full()),
    )


def test_nothing_that_is_read_is_run(path: Path) -> None:
    """A pickle in place of a payload is bytes like others."""
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return print, ("boom",)

    payload = next(path.glob("rank-*"))
    payload.write_bytes(pickle.dumps(Bomb()).ljust(payload.stat().st_size))
    refuses_to_restore(path, PLAN, ValueError, "has another header than the manifest says")


def test_frozen_replicas_fit_everywhere(path: Path) -> None:
    plan = make_plan(PARAMS, LABELS, dict.fromkeys(RULES, replicated()), Mesh(), frozen=("still",))
    (state,) = simulate(lambda comm: restore(path, plan, comm), plan.mesh)
    assert same(state, state_of(plan, 0, 3))
