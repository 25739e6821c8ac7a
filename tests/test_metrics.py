"""Journals and plots: what a run says about itself can be read back, and drawn."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_ep import metrics
from functional_ep.metrics import Record
from functional_ep.plot import plot

COUNTS = st.integers(1, 4).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(0, 50), min_size=experts, max_size=experts), min_size=1, max_size=4
    )
)


@given(counts=COUNTS)
def test_imbalance_is_between_one_and_the_number_of_experts(counts: list[list[int]]) -> None:
    measured = metrics.imbalance(torch.tensor(counts))
    assert 1.0 <= measured <= len(counts[0]) + 1e-12
    even = torch.full((len(counts), len(counts[0])), 3)
    assert metrics.imbalance(even) == 1.0
    alone = torch.zeros_like(even)
    alone[:, -1] = 7
    assert metrics.imbalance(alone) == len(counts[0])


def test_imbalance_is_averaged_over_layers() -> None:
    assert metrics.imbalance(torch.tensor([[1, 3], [2, 2], [0, 0]])) == pytest.approx(3.5 / 3)


def test_bits_are_nats_over_the_logarithm_of_two() -> None:
    assert metrics.bits_per_byte(10 * math.log(2), 5) == pytest.approx(2.0)
    assert math.isnan(metrics.bits_per_byte(0.0, 0))


def entry(step: int, layers: int = 2, experts: int = 4, **more: float) -> Record:
    measured = {
        "loss": torch.tensor(1.5),
        "nll": torch.tensor(12 * math.log(2)),
        "count": torch.tensor(4),
        "lr": torch.tensor(1e-3, dtype=torch.float64),
        "grad_norm": torch.tensor(0.5),
        "tokens_per_expert": torch.arange(layers * experts).view(layers, experts),
    }
    return metrics.record(step, measured) | {"tokens_per_s": 1e3} | more


def test_a_record_keeps_every_metric_and_derives_two() -> None:
    assert entry(3) == {
        "step": 3,
        "loss": 1.5,
        "nll": pytest.approx(12 * math.log(2)),
        "count": 4,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_expert": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "bits_per_byte": pytest.approx(3.0),
        "imbalance": pytest.approx((3 / 1.5 + 7 / 5.5) / 2),
        "tokens_per_s": 1e3,
    }


def test_a_journal_holds_each_record_at_once_and_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    first, second = entry(1), entry(2, valid_bits_per_byte=2.5)
    with metrics.journal(path, steps=2) as log:
        log(first)
        assert metrics.read(path) == [first]
        log(second)
    assert metrics.read(path) == [first, second]
    assert capsys.readouterr().out == (
        "step      2   validation 2.500 bits per byte   "
        "loss 3.000 bits, 1,000 tokens/s, imbalance 1.64\n"
    )


def test_a_journal_keeps_the_records_of_steps_that_are_not_made_again(tmp_path: Path) -> None:
    """By their steps: a journal that was removed begins with a later one, and a line may be cut."""
    path, torn = tmp_path / "metrics.jsonl", metrics.line(entry(5))[:30] + "\0\n"
    path.write_text("".join(map(metrics.line, map(entry, (4, 5, 6, 7)))) + torn)
    with metrics.journal(path, steps=9, done=5) as log:
        log(entry(6))
    assert metrics.read(path) == [entry(4), entry(5), entry(6)]


def test_a_last_record_without_its_end_of_line_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(metrics.line(entry(1)).rstrip())
    with metrics.journal(path, steps=2, done=1) as log:
        log(entry(2))
    assert metrics.read(path) == [entry(1), entry(2)]


@pytest.mark.parametrize("done", [0, 1])
def test_what_is_no_record_does_not_keep_a_run_from_starting(done: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"mine \xff\n")
    with metrics.journal(path, steps=2, done=done) as log:
        log(entry(2))
    assert metrics.read(path) == [entry(2)]


def test_a_number_that_json_lacks_becomes_null() -> None:
    text = metrics.line({"step": 1, "loss": math.nan, "deep": [[1.0, math.inf]]})
    assert json.loads(text) == {"step": 1, "loss": None, "deep": [[1.0, None]]}


RUNS = {
    "one step": [entry(1)],
    "no evaluation": [entry(step) for step in range(1, 9)],
    "all": [
        entry(step) | (dict(valid_bits_per_byte=2.5, unigram=4.9, xz=1.7) if step % 5 == 0 else {})
        for step in range(1, 301)
    ],
    "many experts": [entry(step, layers=12, experts=64) for step in range(1, 4)],
    "a loss that blew up": [entry(1), entry(2, bits_per_byte=math.nan, grad_norm=math.inf)],
    "idle": [entry(1) | {"tokens_per_expert": [[0, 0], [0, 0]]}],
    "a text without entropy": [entry(1, valid_bits_per_byte=0.4, unigram=0.0, xz=480.0)],
    "all is learnt": [
        entry(1),
        entry(2, bits_per_byte=0.0, grad_norm=0.0, valid_bits_per_byte=0.0, unigram=0.0, xz=0.0),
    ],
    "nothing moves": [entry(step, grad_norm=0.0, lr=0.0) for step in (1, 2)],
}


@pytest.mark.parametrize("run", RUNS)
def test_every_run_can_be_drawn(run: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(map(metrics.line, RUNS[run])))
    plot(metrics.read(tmp_path / "metrics.jsonl"), tmp_path / "run.png", title=run)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_records_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no records; train a step first"):
        plot([], tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_missing_extras_are_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ModuleNotFoundError) as error:
        metrics.require_extras()
    assert str(error.value) == (
        "training needs matplotlib for its progress bar and its plot; "
        "install the extra: pip install 'functional-ep[train]'"
    )
