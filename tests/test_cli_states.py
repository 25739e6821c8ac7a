"""The command goes on where it stopped: on any mesh, to the bit on the same mesh."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import TINY_ARGUMENTS

from functional_ep import cli, metrics
from functional_ep.checkpoint import committed, describe
from functional_ep.job import CHECKPOINTS, JOURNAL
from functional_ep.stopping import Wish

STEPS = 6
COMMAND = [*TINY_ARGUMENTS, "--set", f"steps={STEPS}", "--data", __file__, "--save-every", "2"]


def train(out: Path, *more: str) -> None:
    cli.main(["train", *COMMAND, "--out", str(out), *more])


def steps(out: Path) -> list[int]:
    return [record["step"] for record in metrics.read(out / JOURNAL)]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in metrics.read(out / JOURNAL)]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """A signal comes to this process once, when a rank has made its step."""
    wanted, granted = [step], Wish.granted

    def signalled(self: Wish, comm: Any) -> bool:
        wanted[0] -= comm.rank == 0
        if wanted[0] == 0 and comm.rank == 0:
            os.kill(os.getpid(), number)
            while self.signal is None:  # the main thread hears it, a little later
                time.sleep(0.001)
        return granted(self, comm)

    monkeypatch.setattr(Wish, "granted", signalled)


def stopped(out: Path, *more: str) -> int:
    """The exit status of a run that is stopped."""
    with pytest.raises(SystemExit) as ended:
        train(out, *more)
    assert isinstance(ended.value.code, int)
    return ended.value.code


# -- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_stopped_run_is_to_the_bit_the_run_that_never_stopped(
    ranks: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", "--simulate", ranks)
    with monkeypatch.context() as patched:
        stop_after(3, patched, number)
        assert stopped(tmp_path / "cut", "--simulate", ranks) == 128 + number
    assert len(losses(tmp_path / "cut")) == 3
    train(tmp_path / "cut", "--simulate", ranks)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "whole"))) == STEPS, "a curve that stands still proves nothing"


def test_a_run_goes_on_with_another_mesh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "whole")
    for step, mesh in [(2, "edp=2,ep=2"), (1, "edp=1,ep=2")]:
        ranks = "4" if mesh == "edp=2,ep=2" else "2"
        with monkeypatch.context() as patched:
            stop_after(step, patched)
            stopped(tmp_path / "cut", "--simulate", ranks, "--mesh", mesh)
    assert "stopped after step 3: saved as " in capsys.readouterr().out
    train(tmp_path / "cut")
    assert "going on after step 3; --restart begins anew" in capsys.readouterr().out
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


# -- what stays and what goes --------------------------------------------------------------------


def test_the_last_state_and_the_newest_few_stay(tmp_path: Path) -> None:
    train(tmp_path, "--set", "steps=5", "--keep", "2")
    assert [describe(path).step for path in committed(tmp_path / CHECKPOINTS)] == [4, 5]


def test_a_run_that_is_done_says_so_again_and_makes_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    first = capsys.readouterr().out.split("validation, ")[1]
    before = (tmp_path / JOURNAL).read_bytes()
    train(tmp_path)
    assert capsys.readouterr().out.split("validation, ")[1] == first
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_a_run_goes_on_without_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        stopped(tmp_path)
    (tmp_path / JOURNAL).unlink()
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        stopped(tmp_path)
    assert steps(tmp_path) == [4, 5]
    shutil.rmtree(committed(tmp_path / CHECKPOINTS)[-1])  # killed before it was saved: 5 is lost
    train(tmp_path)
    assert steps(tmp_path) == [4, 5, 6]


def test_a_run_that_is_done_says_so_without_its_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    first = capsys.readouterr().out.split("validation, ")[1]
    (tmp_path / JOURNAL).unlink()
    (tmp_path / "training.png").unlink()
    train(tmp_path)
    said = capsys.readouterr().out
    assert "no step of it is on record: its journal was removed" in said
    assert said.split("validation, ")[1] == first.replace(f"{tmp_path}/training.png\n", "")
    assert steps(tmp_path) == [] and not (tmp_path / "training.png").exists()


def test_what_changes_no_number_of_a_step_may_change(tmp_path: Path) -> None:
    train(tmp_path)
    before = losses(tmp_path)
    train(tmp_path, "--set", "eval_bytes=50", "--set", "sample=2", "--set", "eval_every=3")
    assert losses(tmp_path) == before


def test_restart_begins_anew(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, "--restart", "--set", "seed=5")
    assert len(losses(tmp_path)) == STEPS
    (tmp_path / "other").mkdir()
    train(tmp_path / "other", "--set", "seed=5")
    assert losses(tmp_path) == losses(tmp_path / "other")


def test_nothing_is_saved_if_nothing_is_to_be(tmp_path: Path) -> None:
    train(tmp_path, "--save-every", "0")
    assert committed(tmp_path / CHECKPOINTS) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["--set", "lr=0.5"],
            r"another recipe \(lr = 0\.0008 then, 0\.5 now\): give another --out",
        ),
        (["--data", str(Path(__file__).parent / "test_cli.py")], "a run on another text"),
        (["--keep", "0"], "--save-every 2 --keep 0: at least 0 and 1"),
    ],
    ids=["recipe", "text", "keep"],
)
def test_a_run_does_not_go_on_as_another(changed: list[str], message: str, tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, *changed)
    assert (tmp_path / JOURNAL).read_bytes() == before


# -- check and reshard ---------------------------------------------------------------------------


def test_check_says_what_is_there_and_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "--simulate", "2")
    capsys.readouterr()
    cli.main(["check", str(tmp_path / CHECKPOINTS)])
    said = capsys.readouterr().out
    assert "blocks/0/experts/gate_up" in said and "step 6" in said and "PROBLEM" not in said
    newest = committed(tmp_path / CHECKPOINTS)[-1]
    payload = next(newest.glob("*.safetensors"))
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(newest)])
    assert ended.value.code == 1
    assert payload.name in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"functional-ep train: .*is damaged: .* is in order"):
        train(tmp_path, "--simulate", "2")
    with pytest.raises(SystemExit, match=r"functional-ep reshard: .*is damaged: the digest"):
        cli.main(["reshard", str(newest), str(tmp_path / "moved")])
    assert not (tmp_path / "moved").exists()
    (committed(tmp_path / CHECKPOINTS)[0] / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(tmp_path / CHECKPOINTS)])
    said = capsys.readouterr().out
    assert ended.value.code == 1
    assert "PROBLEM: " in said and "manifest.json is damaged" in said and payload.name in said


@pytest.mark.parametrize("name", ["nowhere", "file", "."])
def test_check_says_in_one_line_what_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"^functional-ep check: .* is no checkpoint: "):
        cli.main(["check", str(tmp_path / name)])


def test_reshard_writes_the_same_state_in_other_files(tmp_path: Path) -> None:
    train(tmp_path / "run", "--simulate", "2")
    newest = committed(tmp_path / "run" / CHECKPOINTS)[-1]
    for ranks in (3, 1):
        cli.main(["reshard", str(newest), str(tmp_path / str(ranks)), "--ranks", str(ranks)])
        assert len(list((tmp_path / str(ranks)).glob("*.safetensors"))) == ranks
        newest = tmp_path / str(ranks)
    assert describe(newest).metadata == describe(tmp_path / "3").metadata is not None
    with pytest.raises(SystemExit, match="exists already: choose another path"):
        cli.main(["reshard", str(newest), str(newest)])
    before, after = (whole(path) for path in (tmp_path / "3", newest))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def whole(path: Path) -> dict[str, torch.Tensor]:
    """Every number of a checkpoint, read on one rank."""
    from functional_ep import restore
    from functional_ep.commands import plan_of
    from sharding import Mesh, simulate

    contents = describe(path)
    (state,) = simulate(lambda comm: restore(path, plan_of(contents, comm.mesh), comm), Mesh(edp=1))
    moments = {
        f"{name} of {leaf}": x
        for label in state.opt.values()
        for name, leaves in label.items()
        for leaf, x in leaves.items()
    }
    return state.params | moments
