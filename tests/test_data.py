"""Corpora: who sees which byte is a pure function of (text, seed, step), never of the mesh."""

import lzma
import os
import re
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep import data
from functional_ep.corpus import Corpus, bytes_of, fingerprint, read, standard_library

RANKS = st.integers(1, 9)
TEXTS = st.binary(min_size=2, max_size=80)


def tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


# -- who takes what ------------------------------------------------------------------------------


@given(total=st.integers(0, 40), ranks=RANKS)
def test_shares_tile_the_whole_and_are_even_to_one(total: int, ranks: int) -> None:
    parts = [range(total)[data.share(total, rank, ranks)] for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(text=TEXTS, seed=st.integers(0, 9), step=st.integers(0, 9), drawn=st.data(), ranks=RANKS)
def test_the_global_batch_is_the_union_of_the_ranks_on_every_mesh(
    text: bytes, seed: int, step: int, drawn: st.DataObject, ranks: int
) -> None:
    size = {
        "sequences": drawn.draw(st.integers(0, 12), "sequences"),
        "length": drawn.draw(st.integers(1, len(text) - 1), "length"),
    }
    whole = data.batch(tensor(text), seed, step, **size)
    parts = [
        data.batch(tensor(text), seed, step, **size, rank=r, ranks=ranks) for r in range(ranks)
    ]
    for name in ("input_ids", "labels"):
        assert whole[name].shape == (size["sequences"], size["length"])
        assert whole[name].dtype == torch.int64
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


@given(text=TEXTS, step=st.integers(0, 99), drawn=st.data())
def test_a_row_is_a_piece_of_the_text_and_its_labels_are_the_next_bytes(
    text: bytes, step: int, drawn: st.DataObject
) -> None:
    length = drawn.draw(st.integers(1, len(text) - 1), "length")
    rows = data.batch(tensor(text), 0, step, sequences=4, length=length)
    for inputs, labels in zip(rows["input_ids"].tolist(), rows["labels"].tolist(), strict=True):
        assert bytes([*inputs, labels[-1]]) in text
        assert inputs[1:] == labels[:-1]


def test_every_window_is_drawn_the_first_and_the_last_included() -> None:
    text = torch.arange(12, dtype=torch.uint8)
    rows = data.batch(text, 0, 0, sequences=500, length=4)["input_ids"]
    assert set(rows[:, 0].tolist()) == set(range(8))


def test_seed_and_step_change_the_batch_and_nothing_else_does() -> None:
    text = torch.arange(251, dtype=torch.uint8).repeat(7)

    def draw(seed: int, step: int) -> Tensor:
        return data.batch(text, seed, step, sequences=8, length=3)["input_ids"][:, 0]

    torch.manual_seed(1)
    first = draw(3, 5)
    state = torch.get_rng_state()
    assert torch.equal(draw(3, 5), first)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = {tuple(draw(seed, step).tolist()) for seed in range(20) for step in range(20)}
    assert len(drawn) == 400


# -- validation ----------------------------------------------------------------------------------


@given(text=TEXTS, sequences=st.integers(1, 7), length=st.integers(1, 30), ranks=RANKS)
def test_windows_predict_each_byte_but_the_first_once_over_all_ranks(
    text: bytes, sequences: int, length: int, ranks: int
) -> None:
    per_rank = [
        list(data.windows(tensor(text), sequences=sequences, length=length, rank=r, ranks=ranks))
        for r in range(ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1, "ranks would not meet in collectives"
    together = [part for batches in zip(*per_rank, strict=True) for part in batches]
    inputs = torch.cat([part["input_ids"] for part in together])
    labels = torch.cat([part["labels"] for part in together])
    asked = labels != data.IGNORED
    assert labels.shape == inputs.shape == (len(inputs), length)
    assert bytes(labels[asked].tolist()) == text[1:]
    assert bytes(inputs[asked].tolist()) == text[:-1]
    assert int((~asked).sum()) < length
    assert max(len(part["labels"]) for part in together) <= -(-sequences // ranks)


def test_baselines_are_the_entropy_and_the_size_of_the_predicted_bytes() -> None:
    even = tensor(b"?" + bytes(range(256)) * 4)
    assert data.baselines(even).unigram == pytest.approx(8.0, abs=1e-12)
    assert data.baselines(tensor(b"?aaaa")).unigram == 0.0
    text = Path(__file__).read_bytes()
    packed = lzma.compress(text[1:], preset=9 | lzma.PRESET_EXTREME)
    assert data.baselines(tensor(text)).xz == 8 * len(packed) / (len(text) - 1)


# -- corpora -------------------------------------------------------------------------------------


def test_the_split_is_by_file_and_loses_nothing(tmp_path: Path) -> None:
    files = {f"{n // 10}/{n}.txt": bytes([n]) * (n + 1) for n in range(200)}
    corpus = read([write(tmp_path, files)])
    train, valid = (torch.bincount(side.long(), minlength=200) for side in corpus[:2])
    assert torch.equal(train + valid, torch.arange(1, 201))
    assert not (train.bool() & valid.bool()).any(), "a file on both sides"
    assert 0.02 < int((valid > 0).sum()) / 200 < 0.1


def test_neither_other_files_nor_the_place_of_the_directory_move_a_file(tmp_path: Path) -> None:
    files = {f"{n}.txt": bytes([n]) for n in range(200)}
    few = dict(list(files.items())[::2])
    before = read([write(tmp_path / "a", few)])
    after = read([write(tmp_path / "elsewhere" / "b", files)])
    assert set(before.valid.tolist()) == set(after.valid.tolist()) & set(
        before.train.tolist() + before.valid.tolist()
    )
    assert len(before.valid) > 1


@given(count=st.integers(2, 6))
def test_few_files_leave_no_side_empty(
    count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("few")
    corpus = read([write(root, {f"{n}": bytes([n]) for n in range(count)})])
    assert sorted([*corpus.train.tolist(), *corpus.valid.tolist()]) == list(range(count))
    assert len(corpus.train) and len(corpus.valid)


def test_a_single_file_is_split_by_bytes_and_says_so(tmp_path: Path) -> None:
    text = bytes(range(200))
    write(tmp_path, {"only.txt": text, "empty.txt": b"", ".hidden": b"no", ".git/config": b"no"})
    corpus = read([tmp_path])
    assert (bytes(corpus.train.tolist()), bytes(corpus.valid.tolist())) == (text[:190], text[190:])
    assert corpus.origin == f"{tmp_path}: a single file, so its last 10 of 200 bytes validate"


def test_a_file_reached_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"aaaa", "b": b"bbbb"})
    once, twice = read([tmp_path]), read([tmp_path, tmp_path / "a", tmp_path])
    assert torch.equal(once.train, twice.train) and torch.equal(once.valid, twice.valid)


def test_links_to_directories_are_followed_and_none_is_read_twice(tmp_path: Path) -> None:
    """What a link leads to has the name that it has without one, if it has one below --data."""
    write(tmp_path / "root", {f"z/{n}.txt": bytes([n]) for n in range(100)})
    before = read([tmp_path / "root"])
    links = {"a": tmp_path / "root" / "z", "z/back": tmp_path / "root", "z/self": Path("self")}
    for name, target in links.items():
        (tmp_path / "root" / name).symlink_to(target)
    after = read([tmp_path / "root"])
    assert torch.equal(before.train, after.train) and torch.equal(before.valid, after.valid)
    write(tmp_path / "elsewhere", {"deep/b": b"\xfe", ".hidden/c": b"\xff"})
    (tmp_path / "root" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "link").symlink_to(tmp_path / "root")
    for place in ("root", "only"):
        corpus = read([tmp_path / place])
        assert sorted([*corpus.train.tolist(), *corpus.valid.tolist()]) == [*range(100), 0xFE]


def test_a_path_that_is_no_text_is_read_and_shown_by_its_bytes(tmp_path: Path) -> None:
    root = write(tmp_path / os.fsdecode(b"d\xff"), {os.fsdecode(b"\xe9"): b"1234", "b": b"5678"})
    corpus = read([root])
    assert len(corpus.train) == len(corpus.valid) == 4
    assert corpus.origin.startswith(f"{tmp_path}/d\\xff: 2 files")


def test_bytes_are_taken_as_they_lie_in_memory() -> None:
    text = tensor(b"hello")
    view = bytes_of(text[1:])
    text[1] = ord("E")
    assert bytes(view) == b"Ello"
    assert bytes(bytes_of(torch.tensor([104, 105]))) == b"hi"
    assert bytes(bytes_of(tensor(b"a-b-c")[::2])) == b"abc"
    assert bytes(bytes_of(tensor(b""))) == b""


def test_a_text_is_not_taken_to_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of its bytes takes eight for each of them, and ten times as long."""
    monkeypatch.setattr(Tensor, "tolist", None, raising=False)
    text = torch.zeros(2**20, dtype=torch.uint8)
    assert data.baselines(text).xz < 0.01
    tracemalloc.start()
    try:
        fingerprint(Corpus(text, text, ""))
        assert tracemalloc.get_traced_memory()[1] < len(text) / 10
    finally:
        tracemalloc.stop()


def test_the_standard_library_is_text_enough_and_has_no_tests() -> None:
    corpus, again = standard_library(), standard_library()
    assert torch.equal(corpus.train, again.train) and torch.equal(corpus.valid, again.valid)
    assert len(corpus.train) > 5_000_000
    assert 0.01 < len(corpus.valid) / len(corpus.train) < 0.2
    assert b"class TestLoader(object):" in bytes(torch.cat(corpus[:2]).tolist())
    assert b"class TestCPickler" not in bytes(torch.cat(corpus[:2]).tolist())


# -- what is refused -----------------------------------------------------------------------------


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        read([tmp_path / "nowhere"])
    assert str(error.value) == (
        f"--data {tmp_path}/nowhere: no such file or directory (looked from {Path.cwd()}); "
        "give an existing path"
    )


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_is_neither_a_file_nor_a_directory_is_named(kind: str, tmp_path: Path) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError) as error:
        read([path])
    assert str(error.value) == (
        f"--data {path} is a {kind}, neither a file nor a directory; write what it gives to a file"
    )


def test_an_unreadable_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(OSError, match=rf"cannot read {tmp_path}: Permission denied; make it"):
        read([tmp_path])


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    write(tmp_path, {"secret": b"?"})
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError) as error:
        read([tmp_path])
    assert str(error.value) == (
        f"cannot read {tmp_path}/secret: Permission denied; "
        "make it readable, or leave it out of --data"
    )


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"", "b": b""})
    with pytest.raises(ValueError) as error:
        read([tmp_path])
    assert str(error.value) == (
        f"no bytes to train on: {tmp_path} holds 2 files, none with any content; "
        "give --data a file or a directory that has text"
    )


def test_one_byte_cannot_be_split(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"x"})
    with pytest.raises(ValueError) as error:
        read([tmp_path])
    assert str(error.value) == f"{tmp_path} has one byte in all, nothing to split; give more --data"


def test_texts_too_short_for_a_window_are_refused() -> None:
    with pytest.raises(ValueError) as error:
        data.batch(tensor(b"1234"), 0, 0, sequences=1, length=4)
    short = (
        "the training text has 4 bytes, fewer than one window of seq + 1 = 5; "
        "give more --data, or a smaller seq"
    )
    assert str(error.value) == short
    with pytest.raises(ValueError) as error:
        next(data.windows(tensor(b"1"), sequences=1, length=4))
    single = "the validation text has 1 bytes, and predicting needs 2; give more --data"
    assert str(error.value) == single
    data.check(Corpus(tensor(b"12345"), tensor(b"12"), ""), length=4)
    with pytest.raises(ValueError, match=re.escape(short)):
        data.check(Corpus(tensor(b"1234"), tensor(b"12"), ""), length=4)
    with pytest.raises(ValueError, match=single):
        data.check(Corpus(tensor(b"12345"), tensor(b"1"), ""), length=4)
