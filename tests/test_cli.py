"""The command: one program on every mesh, and arguments that are answered when they are wrong."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep import cli, config, data, job, lm, metrics
from functional_ep.config import Recipe
from functional_ep.corpus import Corpus
from functional_ep.job import Job
from functional_ep.program import build
from functional_ep.progress import Progress
from functional_ep.stopping import Wish
from functional_ep.train import Report, generate, train
from functional_ep.vocabulary import Vocabulary, bytewise
from sharding import Comm, Mesh, simulate

TINY = config.merge(
    Recipe(steps=4, batch=5, seq=12, lr=1e-2, warmup=0.5, eval_every=2, eval_bytes=100, sample=6),
    {"model": dict(dim=16, layers=2, heads=2, experts=4, top_k=2, ffn=24)},
    where="TINY",
)
TINY_ARGUMENTS = [
    argument
    for field in (
        *("steps=3", "batch=4", "seq=12", "eval_every=2", "eval_bytes=100", "sample=6"),
        *("model.dim=16", "model.layers=2", "model.heads=2", "model.experts=4", "model.ffn=24"),
    )
    for argument in ("--set", field)
]


@pytest.fixture
def corpus() -> Corpus:
    text = Path(__file__).read_bytes()
    train_side, valid_side = (torch.tensor(list(side)) for side in (text[:3000], text[3000:3400]))
    return Corpus(train_side, valid_side, "this file")


def job_of(mesh: Mesh, corpus: Corpus) -> Job:
    """A job that leaves nothing behind."""
    nowhere = Path("nowhere")
    progress = Progress(nowhere, every=0, keep=1, newest=None, step=0)
    return Job(TINY, corpus, mesh, torch.device("cpu"), nowhere, progress)


def run(mesh: Mesh, corpus: Corpus) -> list[tuple[Report, list[metrics.Record]]]:
    def program(comm: Comm) -> tuple[Report, list[metrics.Record]]:
        records: list[metrics.Record] = []
        return train(comm, job_of(mesh, corpus), records.append, Wish()), records

    return simulate(program, mesh)


# -- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [Mesh(edp=1, ep=2), Mesh(edp=2, ep=2), Mesh(edp=1, ep=4)], ids=str)
def test_the_curve_is_the_same_on_every_mesh(mesh: Mesh, corpus: Corpus) -> None:
    ((alone, expected),) = run(Mesh(edp=1, ep=1), corpus)
    losses = {record["loss"] for record in expected}
    assert len(losses) == TINY.steps, "a curve that stands still would agree with anything"
    assert [record["lr"] for record in expected] == pytest.approx([0.005, 0.01, 0.01, 0.005])
    for report, records in run(mesh, corpus):
        for record, reference in zip(records, expected, strict=True):
            assert record.keys() == reference.keys()
            assert record["tokens_per_expert"] == reference["tokens_per_expert"]
            assert record["count"] == TINY.batch * TINY.seq
            for name in ("loss", "bits_per_byte", "grad_norm", "lr", "imbalance"):
                assert record[name] == pytest.approx(reference[name], rel=1e-4), name
        assert report.valid_bits_per_byte == pytest.approx(alone.valid_bits_per_byte, rel=1e-4)
        assert report.parameters == alone.parameters


def test_ranks_that_have_read_different_texts_are_refused(corpus: Corpus) -> None:
    other = corpus._replace(train=corpus.train.flip(0))

    def program(comm: Comm, corpus: Corpus) -> Report:
        return train(comm, job_of(comm.mesh, corpus), lambda record: None, Wish())

    message = r"the corpus differs between ranks.*\['train: 3000 bytes, \w+'\].*\['train: 3000"
    with pytest.raises(ValueError, match=message):
        simulate(program, Mesh(edp=1, ep=2), [corpus, other])


def test_evaluations_come_when_asked_and_at_the_end_beside_their_baselines(corpus: Corpus) -> None:
    ((report, records),) = run(Mesh(edp=1, ep=1), corpus)
    evaluated = [record for record in records if "valid_bits_per_byte" in record]
    assert [record["step"] for record in evaluated] == [2, 4]
    assert evaluated[-1]["valid_bits_per_byte"] == report.valid_bits_per_byte < 8.5
    expected = data.baselines(corpus.valid[: TINY.eval_bytes])
    assert (evaluated[0]["unigram"], evaluated[0]["xz"]) == expected == report.baselines


def test_the_validation_text_is_tokenised_once(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    def encode(text: Tensor) -> Tensor:
        asked.append(bytes(text.tolist()))
        return text

    counting = Vocabulary(encode, bytewise().decode)
    monkeypatch.setattr("functional_ep.program.bytewise", lambda: counting)
    run(Mesh(edp=1, ep=1), corpus)
    texts = [corpus.train, corpus.valid[: TINY.eval_bytes]]
    assert asked == [*(bytes(text.tolist()) for text in texts), b"def "]


def test_a_program_is_built_from_shapes_and_makes_its_params_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def init(cfg: lm.Config, seed: int) -> lm.Params:
        made.append(seed)
        return real(cfg, seed)

    real = lm.init
    monkeypatch.setattr(lm, "init", init)

    def program(comm: Comm) -> None:
        built = build(comm, replace(TINY, seed=3))
        assert made == [] and built.parameters > 0
        built.start()

    simulate(program, Mesh(edp=1, ep=1))
    assert made == [3]


def test_only_rank_0_speaks_and_it_says_as_much_as_asked(corpus: Corpus) -> None:
    first, second = (report for report, _ in run(Mesh(edp=1, ep=2), corpus))
    assert first.sample.startswith("def ")
    assert len(first.sample) <= len("def ") + TINY.sample
    assert len(first.sample.encode(errors="replace")) >= len("def ") + TINY.sample
    assert second.sample == ""


def test_what_would_steer_a_terminal_is_shown_as_a_mark() -> None:
    written = b"\x1b[2J\xff\n"
    asked: list[list[tuple[int, ...]]] = [[], []]

    def program(comm: Comm) -> str:
        def logits(shards: Any, input_ids: Tensor) -> Tensor:
            asked[comm.rank].append(tuple(input_ids.shape))
            byte = written[len(asked[comm.rank]) - 1]
            scores = torch.full((*input_ids.shape, 256), -1e9)
            scores[..., byte] = 0.0
            return scores

        recipe = replace(TINY, sample=len(written), seq=7)
        return generate(build(comm, recipe)._replace(logits=logits), None, recipe, comm)

    assert simulate(program, Mesh(edp=1, ep=2)) == ["def \ufffd[2J\ufffd\n", ""]
    assert asked[0] == [(1, length) for length in (4, 5, 6, 7, 7, 7)]
    assert asked[1] == [(0, length) for length in (4, 5, 6, 7, 7, 7)]


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_command_leaves_a_journal_a_plot_and_its_recipe(
    ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(Path(__file__).read_bytes())
    out = tmp_path / "deep" / "out"
    simulated = [] if ranks == 1 else ["--simulate", str(ranks)]
    cli.main(["train", *TINY_ARGUMENTS, *simulated, "--data", str(text), "--out", str(out)])
    records = metrics.read(out / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert config.load(Recipe(), out / "recipe.toml").model.layers == 2
    said = capsys.readouterr().out
    assert said.count("bits per byte\n") == 1, "more than one rank reports"
    assert f"this model        {records[-1]['valid_bits_per_byte']:.3f}" in said
    assert f"unigram entropy   {records[-1]['unigram']:.3f}" in said
    assert f"{out}/metrics.jsonl\n{out}/training.png\n" in said
    assert f"{Mesh(edp=1, ep=ranks)}" in said
    assert "  | def " in said


def test_a_loss_that_is_not_finite_ends_the_run_and_is_on_record(tmp_path: Path) -> None:
    arguments = [*TINY_ARGUMENTS, "--set", "lr=1e30", "--data", __file__, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        cli.main(["train", *arguments])
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert records[-1]["loss"] is None and records[0]["loss"] > 0
    assert re.fullmatch(
        rf"functional-ep train: the loss is (nan|inf) at step {len(records)}, gradient norm "
        r"\S+; lower lr = 1e\+30, or warm up for longer",
        str(error.value),
    )


def test_runs_that_differ_go_to_different_places_and_the_same_run_to_the_same() -> None:
    def out(*arguments: str) -> Path:
        parsed = cli.parser().parse_args(["train", "--data", __file__, *arguments])
        return job.prepare(parsed, None).out

    assert out() == out()
    assert out().parent == Path("runs")
    assert out() != out("--set", "seed=1")
    assert out() == out("--simulate", "2"), "a run cannot go on with other ranks"
    assert out("--out", "here") == Path("here")


def test_a_directory_whose_name_is_no_text_has_a_place_of_its_own(tmp_path: Path) -> None:
    def out(name: bytes) -> Path:
        directory = tmp_path / os.fsdecode(name)
        directory.mkdir()
        (directory / "text").write_bytes(b"0123456789" * 100)
        parsed = cli.parser().parse_args(["train", "--data", str(directory)])
        return job.prepare(parsed, None).out

    assert out(b"d\xff") != out(b"d\xfe")


# -- meshes --------------------------------------------------------------------------------------


@given(ranks=st.integers(1, 64), experts=st.integers(1, 64))
def test_the_default_mesh_has_the_most_expert_parallelism_there_can_be(
    ranks: int, experts: int
) -> None:
    mesh = job.default_mesh(ranks, experts)
    assert mesh.axes == ("edp", "ep")
    assert mesh.size == ranks and experts % mesh["ep"] == 0
    assert not any(ranks % n == 0 and experts % n == 0 for n in range(mesh["ep"] + 1, ranks + 1))


@given(edp=st.integers(1, 99), ep=st.integers(1, 99))
def test_a_mesh_is_read_in_the_order_written(edp: int, ep: int) -> None:
    assert job.parse_mesh(f"edp={edp},ep={ep}") == Mesh(edp=edp, ep=ep)
    assert job.parse_mesh(f"ep={ep},edp={edp}") == Mesh(ep=ep, edp=edp)
    assert job.parse_mesh(f"edp={edp}") == Mesh(edp=edp, ep=1)
    assert job.parse_mesh(f"ep={ep}") == Mesh(edp=1, ep=ep)


@pytest.mark.parametrize("text", ["", "ep", "tp=2", "ep=2,ep=2", "ep=-1", "ep=2,,", "ep=two"])
def test_a_mesh_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as error:
        job.parse_mesh(text)
    assert str(error.value).startswith(f"--mesh {text}: cannot read ")
    assert str(error.value).endswith(
        "give each of the axes edp and ep at most once, as in --mesh edp=2,ep=4"
    )


REFUSED = [
    (
        ["--mesh", "edp=2,ep=2"],
        None,
        "--mesh edp=2,ep=2 has 4 ranks, and there are 1; start 4 (torchrun --nproc-per-node 4 ..., "
        "or --simulate 4), or choose sizes whose product is 1",
    ),
    (
        ["--mesh", "ep=2"],
        4,
        "--mesh ep=2 has 2 ranks, and there are 4; start 2 (torchrun --nproc-per-node 2 ..., "
        "or --simulate 2), or choose sizes whose product is 4",
    ),
    (
        ["--mesh", "ep=3", "--simulate", "3", "--set", "model.experts=4"],
        None,
        "--mesh ep=3: 4 experts do not divide by the 3 ranks along ep; choose an ep that divides 4",
    ),
    (
        ["--simulate", "4"],
        2,
        "--simulate 4 inside one of 2 processes of torchrun; "
        "leave out --simulate, or start without torchrun",
    ),
    (["--simulate", "0"], None, "--simulate 0: give the number of ranks, at least 1"),
]


@pytest.mark.parametrize(("arguments", "launched", "message"), REFUSED)
def test_arguments_that_contradict_are_refused(
    arguments: list[str], launched: int | None, message: str
) -> None:
    parsed = cli.parser().parse_args(["train", *arguments])
    with pytest.raises(ValueError) as error:
        job.prepare(parsed, launched)
    assert str(error.value) == message


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: torch finds no GPU here; leave it out"):
        job.prepare(cli.parser().parse_args(["train", "--device", "cuda"]), None)


def test_a_wrong_argument_ends_the_command_with_one_line() -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["train", "--set", "model.layer=2"])
    assert str(error.value).startswith(
        "functional-ep train: unknown key 'model.layer' (--set model.layer=2); "
        "did you mean 'model.layers'? known keys: model."
    )
    assert "\n" not in str(error.value)
