"""The benchmark against peers: what it calls agreement, what it prints, and one run end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peers.agreement import COMPARED, TOLERANCE, agreement
from peers.measure import Clock, resident, restart_peak
from peers.plot import plot
from peers.results import (
    WARM_UP,
    Group,
    Run,
    append,
    cpu_of,
    peak_of,
    ratios,
    read,
    speed_of,
    summary,
)
from peers.systems import REFERENCE
from peers.systems.ours import Counting
from peers.table import page
from side_by_side import main

from sharding import Comm, Mesh, simulate

STEPS = WARM_UP + 3
LOSSES = tuple(4.0 - 0.1 * i for i in range(STEPS))
OURS = "functional-ep, keep"
CLEAR_REFS = Path("/proc/self/clear_refs")


def run(system: str, seconds: float = 1.0, number: int = 0) -> Run:
    return Run(
        system,
        Group("tiny", "float32", 16, "default"),
        number,
        "2001-02-03T04:05:06",
        cores=2,
        processor="an abacus",
        tokens=64,
        parameters=10**6,
        losses=LOSSES,
        cpu=(9.0,) * WARM_UP + (seconds, 2 * seconds, 3 * seconds),
        wall=(9.0,) * WARM_UP + (0.5,) * 3,
        imported=(2**20,) * 2,
        ready=(2**21,) * 2,
        peak=(3 * 2**20, 4 * 2**20),
        sent=(2**20, 2**19),
        versions={"torch": "1"},
    )


FAILED = replace(run("FSDP2"), losses=(), cpu=(), wall=(), peak=(), sent=(), error="no such luck")


# -- agreement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_losses_within_the_tolerance_agree_and_beyond_it_differ(dtype: str) -> None:
    for factor, step in ((0.9, None), (1.1, 2)):
        off = [x * (1 + factor * TOLERANCE[dtype] * (i == 2)) for i, x in enumerate(LOSSES)]
        assert agreement(off, LOSSES, dtype).step == step


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -LOSSES[1]])
def test_what_is_no_loss_differs(wrong: float) -> None:
    found = agreement((LOSSES[0], wrong, *LOSSES[2:]), LOSSES, "float32")
    assert found.step == 1 and "DIFFERS** at step 1" in str(found)


def test_ten_steps_are_compared_and_no_fewer_than_one() -> None:
    many = [1.0] * COMPARED
    assert agreement([*many, 2.0], [*many, 1.0], "float32").step is None
    assert agreement([*many[1:], 2.0], many, "float32").step == COMPARED - 1
    with pytest.raises(ValueError, match="no losses"):
        agreement([], LOSSES, "float32")


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "A,Z"), "'Z' is none of A, B, C, D"),
        (("--dtypes", "float16"), "'float16' is none of float32, bfloat16"),
        (("--malloc", "keep"), "'keep' is none of default, returned, kept"),
        (("--systems", "Megatron"), "is part of none of transformers, one process"),
    ],
)
def test_names_that_are_not_known_are_refused(
    arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert message in f"{refused.value}{capsys.readouterr().err}"


# -- results -------------------------------------------------------------------------------------


def test_a_summary_leaves_the_warm_up_out_and_takes_the_worst_rank() -> None:
    found = summary([run(OURS), run(OURS, 5.0, number=1), FAILED])
    assert found is not None
    assert (found.cpu, found.cpu_range) == (4.0, (1.0, 15.0))  # of 1 2 3 5 10 15
    assert found.tokens_per_second == 128
    assert (found.peak, found.above_import, found.sent) == (2**22, 3 * 2**20, 2**20)
    assert summary([FAILED]) is None


def test_systems_are_compared_with_what_ran_in_the_same_round() -> None:
    slow = [run(REFERENCE), run(REFERENCE, 8.0, number=1), run(REFERENCE, number=2)]
    ours = [run(OURS, 0.5), run(OURS, 2.0, number=1), run(OURS, number=3)]
    assert ratios(ours, slow, cpu_of) == [0.5, 0.25]
    failed = replace(FAILED, system=OURS, round=2)
    assert ratios([*ours, failed], slow, cpu_of) == [0.5, 0.25]
    assert ratios(ours, [replace(failed, round=0)], cpu_of) == []
    assert "| 0.38 (0.25 to 0.50) | 128 |" in page([*slow, *ours])


def test_the_best_peer_of_each_round_is_the_one_to_compare_with() -> None:
    quick = replace(run("FSDP2", 0.5), wall=(0.25,) * STEPS)
    lean = replace(run("DeepSpeed ZeRO-3", 4.0), peak=(2 * 2**20,) * 2)
    others = [quick, lean, run("FSDP2", 4.0, number=1)]
    ours = [run(OURS), run(OURS, number=1)]
    assert ratios(ours, others, cpu_of) == [2.0, 0.25]
    assert ratios(ours, others, speed_of, max) == [0.5, 1.0]
    assert ratios(ours, others, peak_of) == [2.0, 1.0]
    text = page([run(REFERENCE, 0.1), *others, *ours])
    assert f"| {OURS} | 1.12 (0.25 to 2.00) | 0.75 (0.50 to 1.00) | 1.50 (1.00 to 2.00) |" in text
    assert "round by round |" not in page([run(REFERENCE), *ours])


def test_results_are_read_as_they_were_written_and_a_second_attempt_counts(tmp_path: Path) -> None:
    file = tmp_path / "a" / "results.jsonl"
    for each in (FAILED, run(REFERENCE), replace(run("FSDP2"), tokens=7)):
        append(file, each)
    again = {each.system: each for each in read(file)}
    assert again["FSDP2"].error == "" and again["FSDP2"].tokens == 7
    assert summary([again[REFERENCE]]) == summary([run(REFERENCE)])
    assert again[REFERENCE].group == run(REFERENCE).group


def test_the_page_shows_every_system_and_says_what_failed_or_differs(tmp_path: Path) -> None:
    wrong = replace(run(OURS, 2.0), losses=(*LOSSES[:-1], LOSSES[-1] + 1e-4))
    runs = [run(REFERENCE), FAILED, wrong]
    text = page(runs)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    assert "| 2.000 (1.000 to 3.000) | 1.00 | 128 | 4 | 3 | 1.0 | 0e+00 |" in rows[REFERENCE]
    assert "failed" in rows["FSDP2"] and "`no such luck`" in text
    assert "| 2.00 |" in rows[OURS] and f"DIFFERS** at step {STEPS - 1}" in rows[OURS]
    assert "2001-02-03. 2 cores of an abacus. torch 1." in text
    plot(runs, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


# -- measurements --------------------------------------------------------------------------------


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak is restarted through /proc")
def test_a_peak_is_that_since_it_was_restarted() -> None:
    size = 64 * 2**20
    first = torch.ones(size // 4)
    assert resident("VmHWM") >= size
    del first
    restart_peak()
    before = resident("VmHWM")
    second = torch.ones(size // 4)
    clock = Clock()
    assert 0.9 * size < resident("VmHWM") - before < 1.5 * size
    second.cumsum(0)
    assert 0 < clock.look()[0] < 10


def test_what_a_comm_sends_is_counted_by_what_has_to_travel() -> None:
    def program(comm: Comm) -> list[int]:
        counting, x = Counting(comm), torch.ones(4)
        sent: list[int] = []
        for act in (
            lambda x: counting.all_gather([x], ("ep",)),
            lambda x: counting.reduce_scatter([x], ("ep",)),
            lambda x: counting.all_reduce([x], ("ep",)),
            lambda x: counting.all_to_all([x], ("ep",), *_splits(comm.rank)),
        ):
            with counting as traffic:
                act(x)
            sent.append(traffic.sent)
        return sent

    assert simulate(program, Mesh(ep=2)) == [[16, 8, 16, 12], [16, 8, 16, 4]]


def _splits(rank: int) -> tuple[list[int], list[int]]:
    """Rank 0 keeps one row, rank 1 three."""
    return ([1, 3], [1, 1]) if rank == 0 else ([1, 3], [3, 3])


# -- end to end ----------------------------------------------------------------------------------


def side_by_side(results: Path, *arguments: str) -> None:
    """Runs the command for the smallest shape, one round."""
    shape = ("--shapes", "tiny", "--lengths", "16", "--rounds", "1")
    main([*shape, "--results", str(results), *arguments])


def test_two_ranks_and_one_process_train_alike_and_only_once(tmp_path: Path) -> None:
    file, target = tmp_path / "results.jsonl", tmp_path / "page.md"
    wanted = ("--systems", f"{REFERENCE};{OURS}", "--steps", str(STEPS), "--page", str(target))
    side_by_side(file, *wanted)
    single, ours = read(file)
    assert single.error == "" and ours.error == ""
    assert agreement(ours.losses, single.losses, "float32").step is None
    assert len(ours.peak) == 2 and single.sent == [0] and min(ours.sent) > 0
    before = target.read_text()
    assert OURS in before and target.with_suffix(".png").exists()
    side_by_side(file, *wanted)
    assert len(file.read_text().splitlines()) == 2 and target.read_text() == before


def test_a_run_that_fails_is_reported_with_its_error(tmp_path: Path, capsys: Any) -> None:
    side_by_side(tmp_path / "results.jsonl", "--systems", OURS, "--limit", "0.1")
    said = capsys.readouterr().out
    (failed,) = read(tmp_path / "results.jsonl")
    assert "no answer in time" in failed.error and failed.error in said
    assert f"| {OURS} | failed |" in said
