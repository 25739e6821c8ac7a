"""What the scripts in examples/benchmarks take for granted of their own arithmetic."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import moe_block
import moe_systems
import pytest
import torch
from matplotlib.figure import Figure
from near_ties import compare, ties
from peers.model import write_weights
from peers.rank import Reply
from peers.shapes import SHAPES, Job
from plan_memory import growth
from prefetch import Sent, Times, Wire, report
from scaling import SYSTEMS, Point, jobs, plot

from sharding import Comm, Mesh, simulate
from sharding.comm import Op

GIGABITS = 8e-6  # a byte in a millisecond


def reply(ready: int, peak: int, loaded: int) -> Reply:
    return Reply([1.0], [1.0], [1.0], 0, ready, peak, loaded, 0, 0, {})


def test_memory_grows_by_what_the_largest_rank_has_taken_itself() -> None:
    assert growth([reply(10, 100, 0), reply(10, 120, 30)]) == 90
    assert growth([reply(10, 100, 0), reply(10, 120, 10)]) == 100


def test_points_of_a_plot_differ_in_one_respect() -> None:
    found = list(jobs("tiny"))
    assert {job.tokens for varied, _, job in found if varied == "ranks"} == {1024}
    assert all(job.shape.experts == value for varied, value, job in found if varied == "experts")
    assert all(job.tokens == value for varied, value, job in found if varied == "tokens")
    for varied, _, job in found:
        assert (job.shape.hidden, job.ranks) == (32, job.ranks if varied == "ranks" else 2)


def test_a_plot_has_a_panel_for_each_respect(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point(v, n, s, n, n, n) for v in ("ranks", "tokens") for n in (1, 2) for s in SYSTEMS]
    seen: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: seen.append(figure))
    plot(points, Path("plot.png"))
    (figure,) = seen
    assert [axes.get_xlabel() for axes in figure.axes] == ["ranks", "tokens"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == list(SYSTEMS)
        for line in axes.lines:
            assert torch.as_tensor(line.get_xydata()).tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_wire_carries_while_others_compute_only_if_it_has_begun(ahead: bool) -> None:
    def program(comm: Comm) -> None:
        x, start = torch.ones(5), time.perf_counter()
        with comm.heard_by(Wire(comm, GIGABITS, ahead)):
            first = comm.start(Op("all_gather", ("ep",)), [x])
            second = comm.start(Op("all_gather", ("ep",)), [x])
            time.sleep(0.06)
            assert isinstance(first, Sent) and isinstance(second, Sent)
            assert first.seconds == pytest.approx(20e-3)
            if ahead:  # one after the other, and both while this rank slept
                assert second.arrival is not None and first.arrival is not None
                assert second.arrival == pytest.approx(first.arrival + 20e-3)
                assert first.arrival - start >= 20e-3
            assert torch.equal(first.wait()[0], torch.ones(10))
            assert torch.equal(second.wait()[0], torch.ones(10))
        if not ahead:
            assert time.perf_counter() - start >= 100e-3

    simulate(program, Mesh(ep=2))


def test_what_is_hidden_is_the_share_of_the_gap_that_is_gone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times: Times = {
        ("keep", True): [1.0],
        ("regather", True): [1.1],
        ("keep", False): [1.2],
        ("regather", False): [1.6],
    }
    report(times)
    said = capsys.readouterr().out
    assert "gap 100" in said and "gap 400" in said and "hidden of the second gather: 75%" in said


def test_a_token_goes_elsewhere_where_rounding_is_all_its_expert_leads_by() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0], [5.0, 4.0, 4.0 - 2e-7], [1.0, 3.0, 2.0]])
    rounded = logits + torch.tensor([0.0, 0.0, 1e-6])
    assert list(ties([logits], [logits], k=2)) == []
    ((layer, tokens, lead),) = ties([logits], [rounded], k=2)
    assert (layer, tokens) == (0, 1)
    assert 0 < lead < 1e-6


def test_a_model_trained_rank_by_rank_makes_the_steps_of_one_trained_at_once(
    tmp_path: Path,
) -> None:
    job = Job(SHAPES["tiny"], length=16, sequences=1)
    write_weights(job, tmp_path)
    losses = [(at_once, apart) for at_once, apart, _ in compare(job, tmp_path, 3)]
    for at_once, apart in losses:
        assert apart == pytest.approx(at_once, rel=1e-6)
    assert losses[2][0] != pytest.approx(losses[0][0], rel=1e-3)


# -- a MoE block -----------------------------------------------------------------------------------


def test_the_systems_of_a_moe_block_agree_or_say_why_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    moe_block.main(["--shrink", "32", "--tokens", "64", "--dtype", "float32", "--rounds", "1"])
    printed = capsys.readouterr().out
    for name in ("mixtral", "deepseek"):
        rows = printed.split(f"\n{name}: ")[1].split("\n\n")[0].splitlines()
        by_name = {row[:26].strip(): row for row in rows[2:]}
        assert set(by_name) == {moe_systems.SQUARE, *moe_systems.SYSTEMS}
        for system in ("functional-ep", "transformers, grouped_mm"):
            assert float(by_name[system].split()[-2]) < 1e-5, by_name[system]


def measured(systems: dict[str, moe_systems.System]) -> dict[str, moe_block.Measured]:
    block = moe_systems.Block(16, 32, experts=4, top_k=2)
    inputs = moe_systems.make_inputs(block, 24, torch.device("cpu"))
    run = partial(moe_block.measure, block, inputs, systems, 2)
    return simulate(run, Mesh())[0]


def test_a_block_that_is_another_is_seen_by_its_gradients() -> None:
    def without_scores(block: moe_systems.Block, inputs: moe_systems.Inputs, comm: Comm) -> Any:
        return moe_systems.ours(block._replace(top_k=1), inputs, comm)

    def broken(block: moe_systems.Block, inputs: moe_systems.Inputs, comm: Comm) -> Any:
        raise ImportError("no such\nkernel")

    found = measured({"ours": moe_systems.ours, "wrong": without_scores, "broken": broken})
    assert found["ours"].error is not None and found["ours"].error < 1e-5
    assert found["wrong"].error is not None and found["wrong"].error > 0.1
    assert found["broken"].failed == "ImportError: no such kernel"
    printed = moe_block.table(found, peak=1e12)
    assert "not run: ImportError: no such kernel" in printed and "MFU" in printed
    assert all(len(each.seconds) == 2 for each in found.values() if not each.failed)
