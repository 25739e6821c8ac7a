"""Safetensors files: byte for byte what the format's own library writes, and reads."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from functional_ep import safetensors_file
from functional_ep.box import boxes, sizes_of, slices_of
from functional_ep.huggingface.lazy import Lazy, read
from functional_ep.safetensors_file import (
    DTYPES,
    make_header,
    read_header,
    write_from,
)

Tensors = dict[str, Tensor]


@st.composite
def files(draw: st.DrawFn) -> Tensors:
    """Up to five tensors of any dtypes and shapes, with names in any alphabet."""
    names = draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=5, unique=True))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    tensors: Tensors = {}
    for name in names:
        shape = draw(st.lists(st.sampled_from([1, 2, 3, 0]), max_size=3))
        numbers = torch.randint(0, 2, shape, generator=stream)
        tensors[name] = numbers.to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    return tensors


def written(path: Path, tensors: Tensors) -> bytes:
    """The file as it is written here: a header, and then each tensor in its place."""
    header, places, size = make_header(path, tensors)
    path.write_bytes(header + bytes(size - len(header)))
    for place in places:
        write_from(path, place.start, tensors[place.name])
    return path.read_bytes()


def is_right(tensors: Tensors) -> bool:
    with TemporaryDirectory() as folder:
        return written(Path(folder) / "x", tensors) == save(tensors, {"format": "pt"})


@given(files())
def test_a_file_is_what_the_library_writes(tensors: Tensors) -> None:
    assert is_right(tensors)


def test_another_order_of_dtypes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "DTYPES", dict(sorted(DTYPES.items())))
    assert not is_right({name: torch.zeros(1, dtype=dtype) for name, dtype in DTYPES.items()})


@given(files(), st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_any_part_can_be_read(tensors: Tensors, ends: tuple[int, int]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(save(tensors))
        stored = read_header(path)
        assert stored.keys() == tensors.keys()
        for name, x in tensors.items():
            lo, hi = sorted(end % (x.numel() + 1) for end in ends)
            found = read(Lazy.stored(x.shape, x.dtype, stored[name].fill), lo, hi)
            same = found.view(torch.uint8), x.reshape(-1)[lo:hi].view(torch.uint8)
            assert torch.equal(*same)


@given(st.integers(0, 59), st.integers(0, 59))
def test_what_is_read_can_be_cast_and_scattered(a: int, b: int) -> None:
    x = torch.arange(60.0).view(3, 4, 5)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(save({"x": x}))
        stored = read_header(path)["x"]
        for box in boxes(min(a, b), max(a, b), (3, 4, 5)):
            out = torch.empty(sizes_of(box)[::-1], dtype=torch.float64).permute(2, 1, 0)
            stored.fill(out, box)
            assert torch.equal(out, x[slices_of(box)].double())


def test_a_file_that_is_cut_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(save({"x": torch.zeros(9)}))
    stored = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"x \(9,\) F32 in .*: the file ended while it was read"):
        stored.fill(torch.empty(9), ((0, 9),))


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = tmp_path / "x", torch.arange(1000.0)
    path.write_bytes(save({"x": x}))
    sizes, right = list[int](), safetensors_file.read_into

    def watching(path: Path, start: int, out: Tensor) -> int:
        sizes.append(out.numel())
        return right(path, start, out)

    monkeypatch.setattr(safetensors_file, "PIECE", 1024)
    monkeypatch.setattr(safetensors_file, "read_into", watching)
    found = torch.empty(1000, dtype=torch.float64)
    read_header(path)["x"].fill(found, ((0, 1000),))
    assert torch.equal(found, x.double()) and sizes == [256, 256, 256, 232]
