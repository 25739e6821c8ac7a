"""The command and the example on weights in hub layout: alike on every mesh, and written back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from functional_ep import cli, metrics
from functional_ep.vocabulary import of_directory

LONG = int(0.94 * Path(__file__).stat().st_size)  # shorter than what trains, in bytes not tokens
ROOT = Path(__file__).parents[1]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny model and a tokenizer that knows bytes and a few pairs of them."""
    path = tmp_path / "weights"
    build("mixtral", vocab_size=260).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("e", "r"), ("t", "h"), ("i", "n"), ("\u0120", "t")]
    tokens = [*letters, *map("".join, pairs)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def test_a_text_goes_through_its_tokenizer_and_back(weights: Path) -> None:
    vocabulary, text = of_directory(weights), Path(__file__).read_bytes()
    tokens = vocabulary.encode(torch.tensor(list(text), dtype=torch.uint8))
    assert len(tokens) < len(text) and int(tokens.max()) >= 256, "pairs are tokens"
    assert vocabulary.decode(tokens.tolist()) == text


def test_a_text_is_tokenised_without_a_list_of_its_bytes(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, text = of_directory(weights), torch.tensor(list(b"the \xff"), dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "tolist", None, raising=False)
    tokens = vocabulary.encode(text)
    assert vocabulary.decode(list(map(int, tokens))) == "the \ufffd".encode()


def arguments(weights: Path, out: Path, ranks: int) -> list[str]:
    changes = ("steps=3", "batch=3", "seq=12", "eval_every=2", "eval_bytes=150", "sample=4")
    return [
        *("train", "--model", str(weights), "--data", __file__, "--out", str(out)),
        *("--simulate", str(ranks)),
        *(argument for change in (*changes, "lr=1e-2") for argument in ("--set", change)),
    ]


def test_the_command_trains_weights_alike_on_every_mesh_and_writes_them(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of three sequences on four ranks: one of them has no token, in every step."""
    curves: list[list[tuple[float, float]]] = []
    for ranks in (1, 2, 4):
        out = tmp_path / f"{ranks}"
        cli.main(arguments(weights, out, ranks))
        records = metrics.read(out / "metrics.jsonl")
        curves.append([(record["loss"], record["grad_norm"]) for record in records])
        assert records[-1]["valid_bits_per_byte"] < records[1]["valid_bits_per_byte"]
        assert f"MixtralForCausalLM; Mesh(edp=1, ep={ranks})" in capsys.readouterr().out
        AutoTokenizer.from_pretrained(out / "weights")
    for curve in curves[1:]:
        for found, expected in zip(curve, curves[0], strict=True):
            assert found == pytest.approx(expected, rel=2e-5)
    before, *after = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (weights, *(tmp_path / f"{ranks}" / "weights" for ranks in (1, 2, 4)))
    )
    for name, x in after[0].items():
        assert not torch.equal(x, before[name]), f"{name} has not moved"
        for other in after[1:]:
            torch.testing.assert_close(other[name], x, rtol=0, atol=1e-3)


def test_a_validation_text_of_one_token_is_refused_before_any_step(
    weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("th" * 500)
    more = ["--data", str(tmp_path / "text"), "--set", "eval_bytes=2"]
    message = "validation text has 1 tokens, and predicting needs 2: give more --data, or a larger"
    with pytest.raises(SystemExit, match=message):
        cli.main([*arguments(weights, tmp_path / "out", 1), *more])
    assert metrics.read(tmp_path / "out" / "metrics.jsonl") == []


def test_weights_are_written_before_anything_else_can_go_wrong(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError("no sample today")

    monkeypatch.setattr("functional_ep.train.generate", fail)
    with pytest.raises(SystemExit, match="no sample today"):
        cli.main(arguments(weights, tmp_path / "out", 2))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "weights")


@pytest.mark.parametrize("missing", ["tokenizer", "out"])
def test_what_would_be_lost_at_the_end_is_refused_at_the_start(
    missing: str, weights: Path, tmp_path: Path
) -> None:
    if missing == "tokenizer":
        for file in weights.glob("tokenizer*"):
            file.unlink()
    else:
        (tmp_path / "run" / "weights").mkdir(parents=True)
    message = {"tokenizer": "has no tokenizer", "out": "weights exists already: move it away"}
    with pytest.raises(SystemExit, match=message[missing]):
        cli.main(arguments(weights, tmp_path / "run", 1))


def damaged(weights: Path) -> None:
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def smaller(weights: Path) -> None:
    build("mixtral", vocab_size=100).save_pretrained(weights)


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (damaged, [], r"functional-ep train: .*model\.safetensors.*"),
        (smaller, [], r"makes token 2\d\d, but the model knows 100: the two do not belong"),
        (None, ["--mesh", "edp=1,ep=3", "--simulate", "3"], r"4.* divide by the 3 ranks"),
        (None, ["--set", f"seq={LONG}"], rf"text has \d+ tokens, fewer than .* = {LONG + 1}"),
        (None, ["--set", "model.layers=3"], r"model\.\* describes a new model, but --model loads"),
    ],
    ids=["truncated", "tokenizer", "mesh", "short", "both"],
)
def test_what_cannot_start_ends_the_command_with_one_line(
    spoil: Any, more: list[str], message: str, weights: Path, tmp_path: Path
) -> None:
    if spoil is not None:
        spoil(weights)
    with pytest.raises(SystemExit, match=message):
        cli.main([*arguments(weights, tmp_path / "run", 1), *more])


def test_the_example_judges_by_another_text_as_transformers_would(
    weights: Path, tmp_path: Path
) -> None:
    judge, out = tmp_path / "judge.txt", tmp_path / "out"
    judge.write_text("the inner tower, or then another\n" * 11)
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / "finetune.py", weights, __file__]
    sizes = ["--steps", "2", "--batch", "1", "--length", "48", "--lr", "1e-2", "--valid", judge]
    run = subprocess.run([*command, out, *sizes], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    tokens = AutoTokenizer.from_pretrained(weights)(
        judge.read_text(), return_tensors="pt"
    ).input_ids
    windows = tokens[0].unfold(0, 49, 48)
    assert len(windows) % 2, "the ranks have batches of one window each, one of them more of them"
    expected: list[float] = []
    for path in (weights, out):
        model = AutoModelForCausalLM.from_pretrained(path)
        expected.append(float(model(input_ids=windows, labels=windows).loss.detach()))
    assert f"on {judge}: {expected[0]:.4f} to {expected[1]:.4f}\n" in run.stdout
    assert abs(expected[0] - expected[1]) > 1e-2


@pytest.mark.parametrize(
    "chosen",
    [[], ["--train", "*.mlp.gate.*"], ["--freeze", "*.experts.*"], ["--lora", "2"]],
    ids=lambda chosen: " ".join(chosen) or "all",
)
def test_the_example_trains_what_it_is_told_to(
    chosen: list[str], weights: Path, tmp_path: Path
) -> None:
    out, example = tmp_path / "out", ROOT / "examples" / "finetune.py"
    command = [sys.executable, example, weights, __file__, out, "--steps", "2", "--batch", "3"]
    quiet = ["-W", "ignore"]
    run = subprocess.run(
        [command[0], *quiet, *command[1:], *chosen], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("loss ")
    if "--lora" in chosen:
        assert (out / "adapter_model.safetensors").is_file()
        return
    before = AutoModelForCausalLM.from_pretrained(weights).state_dict()
    for name, x in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        moves = (
            ".mlp.gate." in name
            if "--train" in chosen
            else not ("--freeze" in chosen and ".experts." in name)
        )
        assert torch.equal(x, before[name]) != moves, name
