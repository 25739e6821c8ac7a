"""Runs that are killed: what is saved loads, and what goes on is the run that never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from budget import rounds
from farm import free_port

from functional_ep import metrics
from functional_ep.checkpoint import committed, verify
from functional_ep.job import CHECKPOINTS, JOURNAL

STEPS, SAID = 120, "said.txt"
RECIPE = (
    *(f"steps={STEPS}", "batch=6", "seq=16", "eval_every=1000", "eval_bytes=50", "sample=0"),
    *("model.dim=16", "model.layers=2", "model.heads=2", "model.experts=4", "model.ffn=24"),
)
START = 60.0  # seconds that a launch may take on a busy machine
TRAIN = ["-m", "functional_ep", "train", "--data", __file__, "--save-every", "2", "--keep", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(out: Path, *launcher: str) -> list[str]:
    """A training by torchrun with these arguments; in this process alone without any."""
    recipe = [argument for each in RECIPE for argument in ("--set", each)]
    first = ["-m", "torch.distributed.run", *launcher] if launcher else []
    return [sys.executable, *first, *TRAIN, *recipe, "--out", str(out)]


def on(ranks: int) -> tuple[str, ...]:
    """The launcher's arguments."""
    return ("--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()


def records(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal that may be in the middle of being written."""
    path = out / JOURNAL
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(each for child in children for each in descendants(int(child)))]


def named(pid: int) -> bytes:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def start(out: Path, *launcher: str, said: str = SAID) -> subprocess.Popen[bytes]:
    """The command, under way; what it says goes to a file in ``out``."""
    out.mkdir(exist_ok=True)
    with open(out / said, "w") as file:
        return subprocess.Popen(
            command(out, *launcher), env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
        )


def finish(process: subprocess.Popen[bytes], out: Path) -> str:
    """What a run that comes to its end has said."""
    status, said = process.wait(START), (out / SAID).read_text()
    assert status == 0, said
    return said


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for(process: subprocess.Popen[bytes], out: Path, step: int) -> None:
    """Until a record of this step is there, or the process has ended."""
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        if any(record["step"] >= step for record in records(out)):
            return
        time.sleep(0.01)
    assert process.poll() is not None, f"no step {step} within {START} s"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nobody stops."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(command(out), check=True, env=ENVIRONMENT, capture_output=True)
    return [record["loss"] for record in metrics.read(out / JOURNAL)]


def same_curve(out: Path, whole: list[float]) -> None:
    """Every step once, in order, and the losses of the run that nobody stopped."""
    found = metrics.read(out / JOURNAL)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    # float32 on other meshes: sums of other order, five digits after so many steps.
    assert [record["loss"] for record in found] == pytest.approx(whole, rel=1e-5)


def newest_is_whole(out: Path) -> int:
    """The step of the newest state, of which every byte is right; 0 without any."""
    paths = committed(out / CHECKPOINTS)
    if not paths:
        return 0
    report = verify(paths[-1])
    assert not report.problems, report.problems
    return report.step


# -- killed ---------------------------------------------------------------------------------------


def test_the_newest_state_survives_kill_9_and_goes_on_with_other_ranks(
    tmp_path: Path, whole: list[float]
) -> None:
    chance = random.Random(0)
    saved = 0
    for number in range(rounds(ci=5, nightly=30)):
        ranks = (2, 1)[number % 2]
        process = start(tmp_path, *on(ranks))
        wait_for(process, tmp_path, saved + chance.randint(1, STEPS // 6))
        time.sleep(chance.random() * 0.05)  # anywhere in a step, or in a save
        kill(descendants(process.pid))
        process.wait()
        before, saved = saved, newest_is_whole(tmp_path)
        assert saved >= before
    finish(start(tmp_path, *on(2)), tmp_path)
    same_curve(tmp_path, whole)


def test_one_killed_rank_restarts_all(tmp_path: Path, whole: list[float]) -> None:
    process = start(tmp_path, *on(2), "--max-restarts=1")
    wait_for(process, tmp_path, 5)
    worker = next(pid for pid in descendants(process.pid)[1:] if TRAIN[1].encode() in named(pid))
    kill([worker])
    finish(process, tmp_path)
    same_curve(tmp_path, whole)


def test_an_elastic_run_comes_back_with_fewer_ranks(tmp_path: Path, whole: list[float]) -> None:
    """Two launchers, as on two hosts, of which one goes away for good."""
    port = free_port()

    def launcher(said: str, hosts: bool) -> subprocess.Popen[bytes]:
        soon = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2"
        return start(
            tmp_path,
            *("--nnodes=1:2", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=survival"),
            *(f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={hosts},{soon}"),
            said=said,
        )

    stays, goes = launcher(SAID, hosts=True), launcher("goes.txt", hosts=False)
    wait_for(stays, tmp_path, 5)
    kill(descendants(goes.pid))
    goes.wait()
    said = finish(stays, tmp_path)
    assert "Mesh(edp=1, ep=1)" in said and "going on after step" in said
    same_curve(tmp_path, whole)


# -- stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_the_same_command_goes_on_to_the_bit(
    number: signal.Signals, tmp_path: Path, whole: list[float]
) -> None:
    process = start(tmp_path)
    wait_for(process, tmp_path, 5)
    process.send_signal(number)
    assert process.wait(START) == 128 + number
    step = newest_is_whole(tmp_path)
    assert f"stopped after step {step}: saved as" in (tmp_path / SAID).read_text()
    assert f"going on after step {step}" in finish(start(tmp_path), tmp_path)
    assert [record["loss"] for record in metrics.read(tmp_path / JOURNAL)] == whole
