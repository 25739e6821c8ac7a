"""Bad input of weights in and out: one clear error each, with the file, the tensor and the fix."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Alone, Hub, Model, described, plan_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from functional_ep import to_huggingface
from functional_ep.huggingface import dump
from functional_ep.huggingface.load import load, load_buffers
from sharding import Comm, Mesh, simulate

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
ONE = Mesh(edp=1, ep=1)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    return Hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Model:
    """A model whose directory may be damaged."""
    whole = hub.model("mixtral")
    return whole._replace(source=shutil.copytree(whole.source, tmp_path / "model"))


def read(model: Model, source: Any = None) -> Any:
    source = model.source if source is None else source
    return load(model.skeleton, source, plan_of(model, ONE), Alone())


def edit(change: Callable[[State], Any]) -> Callable[[Path], None]:
    """Another file of tensors, written by the safetensors library."""

    def damage(path: Path) -> None:
        tensors = load_file(path / SINGLE)
        change(tensors)
        save_file(tensors, path / SINGLE, {"format": "pt"})

    return damage


def replace(name: str, f: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return edit(lambda tensors: tensors.update({name: f(tensors[name]).contiguous()}))


def cut(size: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        os.truncate(path / SINGLE, size((path / SINGLE).stat().st_size))

    return damage


def rewrite(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(content)


def pickled(path: Path) -> None:
    (path / SINGLE).rename(path / "pytorch_model.bin")


def renumbered(tensors: State) -> None:
    for kind in ("w1", "w2", "w3"):
        tensors[EXPERT.replace("2.w1", f"4.{kind}")] = tensors.pop(EXPERT.replace("w1", kind))


def without_last(tensors: State) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.0.") and "s.3." in name]:
        del tensors[name]


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no directory": (shutil.rmtree, FileNotFoundError, r"model is no directory: .*snapshot_down"),
    "no config": (
        lambda path: (path / "config.json").unlink(),
        FileNotFoundError,
        r"model has no config\.json",
    ),
    "no weights": (
        lambda path: (path / SINGLE).unlink(),
        FileNotFoundError,
        r"model has no weights: neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "pickled weights": (
        pickled,
        ValueError,
        r"weights as pytorch_model\.bin: .*never opened.*save_pretrained",
    ),
    "an empty file": (cut(lambda size: 0), ValueError, r"model\.safetensors is truncated"),
    "half of a header": (cut(lambda size: 100), ValueError, r"truncated.* 100 bytes"),
    "half of the numbers": (
        cut(lambda size: size - 1000),
        ValueError,
        r"model\.safetensors is truncated: model\.\S+ ends at byte \d+.*again",
    ),
    "no header": (
        rewrite(SINGLE, (16).to_bytes(8, "little") + b"not a JSON text!"),
        ValueError,
        r"model\.safetensors is no safetensors file: its header cannot be read",
    ),
    "a header of something else": (
        rewrite(SINGLE, (16).to_bytes(8, "little") + b'{"a": [1, 2, 3]}'),
        ValueError,
        r"its header cannot be read",
    ),
    "a size that does not fit": (
        rewrite(
            SINGLE,
            (62).to_bytes(8, "little")
            + b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}} '
            + bytes(8),
        ),
        ValueError,
        r"damaged: a \(3,\) F32 in .* cannot have 8 bytes",
    ),
    "a tensor missing": (
        edit(lambda tensors: tensors.pop(NORM)),
        ValueError,
        rf"{NORM} of MixtralForCausalLM cannot be found, .*model\.safetensors.*incomplete",
    ),
    "an expert missing": (
        edit(lambda tensors: tensors.pop(EXPERT)),
        ValueError,
        rf"{EXPERT} is missing from .*model\.safetensors.*gate_up_proj is made of it",
    ),
    "the last expert missing": (
        edit(without_last),
        ValueError,
        r"model\.layers\.0\.\S+experts\.0\.w\d\.weight .* makes model\.layers\.0\.mlp\.experts\.\S+"
        r" \(3, .*the model's has the shape \(4, ",
    ),
    "an expert with another number": (edit(renumbered), ValueError, r"experts\.2\.\S+ is missing"),
    "a kind of expert tensors missing": (
        edit(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".w3." in name]),
        ValueError,
        r"layers\.0\.mlp\.experts\.gate_up_proj cannot be made of \S+experts\.0\.w1\.weight .* "
        r"alone: there is no \.experts\.\*\.w3\.weight",
    ),
    "another shape": (
        replace(NORM, lambda x: x[:-1]),
        ValueError,
        rf"{NORM} \(31,\) of .*model\.safetensors makes {NORM} \(31,\), .* shape \(32,\)",
    ),
    "a transposed tensor": (
        replace("lm_head.weight", torch.t),
        ValueError,
        r"lm_head\.weight \(32, 96\) of .* the shape \(96, 32\)",
    ),
    "an expert of another shape": (
        replace(EXPERT, lambda x: x[:, :-1]),
        ValueError,
        rf"{EXPERT} \(24, 31\) of .*model\.safetensors, but the others .* shape \(24, 32\)",
    ),
    "integers": (
        replace(NORM, lambda x: x.to(torch.int32)),
        ValueError,
        rf"{NORM} \(32,\) of .*model\.safetensors is torch\.int32.*Dequantise",
    ),
    "eight bits": (
        replace(EXPERT, lambda x: x.to(torch.float8_e4m3fn)),
        ValueError,
        rf"{EXPERT} .* is torch\.float8_e4m3fn.*Dequantise",
    ),
    "a dtype unknown to torch": (
        lambda path: (path / SINGLE).write_bytes(
            (path / SINGLE).read_bytes().replace(b'"F32"', b'"F4X"', 1)
        ),
        ValueError,
        r"of a dtype unknown to torch",
    ),
    "a tensor too many": (
        edit(lambda tensors: tensors.update({"model.vision.weight": torch.zeros(1)})),
        ValueError,
        r"MixtralForCausalLM has no model\.vision\.weight, found in .*model\.safetensors",
    ),
    "a tensor twice": (
        edit(lambda tensors: tensors.update({"norm.weight": torch.zeros(32)})),
        ValueError,
        r"model\.norm\.weight and norm\.weight are both model\.norm\.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused(model: Model, damage: str) -> None:
    act, kind, message = DAMAGES[damage]
    if damage == "a transposed tensor":
        edit(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 32)}))(model.source)
    act(model.source)
    with pytest.raises(kind, match=message) as caught:
        read(model)
    assert len(str(caught.value)) < 700


INDEX_DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "a file missing": (
        lambda path: next(path.glob("model-00002*")).unlink(),
        FileNotFoundError,
        r"model-00002-of-\d+\.safetensors is missing: model\.safetensors\.index\.json says that "
        r"model\.\S+ and \d+ other tensors are in it",
    ),
    "an index without names": (rewrite(INDEX, b"{}"), ValueError, r"index\.json is damaged"),
    "an index of names that are not there": (
        lambda path: (path / INDEX).write_text(
            json.dumps(
                {
                    "weight_map": {
                        **json.loads((path / INDEX).read_text())["weight_map"],
                        "gone": next(path.glob("model-00001*")).name,
                    }
                }
            )
        ),
        ValueError,
        r"model-00001-of-\d+\.safetensors has no tensor gone, but .*index\.json says so",
    ),
    "a tensor in two files": (
        lambda path: shutil.copyfile(
            next(path.glob("model-00001*")), next(path.glob("model-00002*"))
        ),
        ValueError,
        r"is in two files, .*model-00001.* and .*model-00002",
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_a_damaged_index_is_refused(hub: Hub, tmp_path: Path, damage: str) -> None:
    whole = hub.model("mixtral", "10KB")
    model = whole._replace(source=shutil.copytree(whole.source, tmp_path / "model"))
    act, kind, message = INDEX_DAMAGES[damage]
    act(model.source)
    with pytest.raises(kind, match=message):
        read(model)


def test_what_transformers_leaves_out_is_left_out(hub: Hub, tmp_path: Path) -> None:
    whole = hub.model("deepseek_v3")
    model = whole._replace(source=shutil.copytree(whole.source, tmp_path / "model"))
    edit(lambda tensors: tensors.update({"model.layers.61.next.weight": torch.zeros(1)}))(
        model.source
    )
    assert read(model).keys() == model.shapes.keys()
    name = next(iter(model.buffers))
    edit(lambda tensors: tensors.pop(name))(model.source)
    with pytest.raises(ValueError, match=rf"{name} of DeepseekV3ForCausalLM cannot be found"):
        load_buffers(model.skeleton, model.source)


def test_tied_weights_may_be_there_under_any_of_their_names_if_they_agree(model: Model) -> None:
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    edit(lambda tensors: tensors.update({second: tensors.pop(first)}))(model.source)
    expected = model.plain[first].reshape(-1)
    assert torch.equal(read(model)[first], expected)
    edit(lambda tensors: tensors.update({first: tensors[second].clone()}))(model.source)
    assert torch.equal(read(model)[first], expected)
    edit(lambda tensors: tensors[second][5].add_(1))(model.source)
    with pytest.raises(ValueError, match=rf"{second} .* differ, but .* are tied in the model"):
        read(model)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ({NORM: "text"}, ValueError, rf"{NORM} of the state dict is str"),
        ({NORM: torch.empty(32, device="meta")}, ValueError, "is a meta tensor: weights are"),
        ({}, ValueError, r"cannot be found, as in an empty source"),
        (7, TypeError, "from a directory, a state dict or a module, not from int"),
    ],
)
def test_no_weights_in_memory(
    model: Model, source: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        read(model, source)


def test_quantised_weights_are_refused_by_their_config(model: Model) -> None:
    model.skeleton.config.quantization_config = {"quant_method": "mxfp4"}
    try:
        with pytest.raises(
            ValueError, match=r"MixtralForCausalLM are quantised.*mxfp4.*dequantize"
        ):
            read(model)
    finally:
        del model.skeleton.config.quantization_config


def test_a_skeleton_is_no_source(model: Model) -> None:
    with pytest.raises(ValueError, match=r"of MixtralForCausalLM is a meta tensor"):
        read(model, model.skeleton)


def test_a_plan_of_something_else_is_refused(hub: Hub, model: Model) -> None:
    other = hub.model("olmoe")
    with pytest.raises(ValueError, match="is no parameter of MixtralForCausalLM: the plan has to"):
        load(model.skeleton, model.source, plan_of(other, ONE), Alone())
    with pytest.raises(ValueError, match=r"the plan was made for Mesh\(edp=2, ep=1\)"):
        load(model.skeleton, model.source, plan_of(model, Mesh(edp=2, ep=1)), Alone())
    narrow = model._replace(shapes={n: x[:4] for n, x in model.shapes.items()})
    with pytest.raises(ValueError, match=r"\(4, 32\) expected, found \(96, 32\) for it"):
        load(model.skeleton, model.source, plan_of(narrow, ONE), Alone())


# -- out -----------------------------------------------------------------------------------------


def write(model: Model, path: Path, mesh: Mesh = ONE) -> None:
    def program(comm: Comm) -> None:
        plan = plan_of(model, mesh)
        shards = load(model.skeleton, model.source, plan, comm)
        to_huggingface(path, shards, plan, comm, model)

    simulate(program, mesh)


def test_an_existing_directory_is_left_alone(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    write(model, path, Mesh(edp=2, ep=1))  # an empty one will do
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileExistsError, match=r"out exists and is no empty directory: choose"):
        write(model, path, Mesh(edp=2, ep=1))
    with pytest.raises(FileExistsError, match=r"config\.json exists and is no empty directory"):
        write(model, path / "config.json")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_leaves_nothing_and_fails_everywhere(
    model: Model, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh, right, errors = Mesh(edp=2, ep=1), dump.write_from, dict[int, str]()

    def full(*arguments: Any) -> None:
        if threading.current_thread().name == f"rank {rank}":
            raise OSError(28, "No space left on device")
        right(*arguments)

    def program(comm: Comm) -> None:
        plan = plan_of(model, mesh)
        shards = load(model.skeleton, model.source, plan, comm)
        try:
            to_huggingface(tmp_path / "out", shards, plan, comm, model)
        except OSError as error:
            errors[comm.rank] = str(error)

    monkeypatch.setattr(dump, "PIECE", 4096)  # so that both ranks have blocks to write
    monkeypatch.setattr(dump, "write_from", full)
    simulate(program, mesh)
    assert errors[0] == errors[1] == f"[Errno 28] rank {rank}: No space left on device"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_it_appears_only_when_it_is_complete(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, seen = dump._rename, list[bool]()

    def watching(growing: Path, path: Path) -> None:
        seen.append(path.exists())
        assert (growing / SINGLE).read_bytes() == (model.source / SINGLE).read_bytes()
        right(growing, path)

    monkeypatch.setattr(dump, "_rename", watching)
    (tmp_path / ".out.incomplete").mkdir()  # of a run that was killed
    (tmp_path / ".out.incomplete" / "old").touch()
    write(model, tmp_path / "out")
    assert seen == [False]
    assert "old" not in os.listdir(tmp_path / "out")
    assert not (tmp_path / ".out.incomplete").exists()


def test_tokenizer_and_generation_files_come_along(model: Model, tmp_path: Path) -> None:
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"]
    for name in [*files, "chat_template.jinja", "training_args.bin", "README.md"]:
        (model.source / name).write_text(name)
    (model.source / "generation_config.json").write_text('{"top_k": 3}')
    write(model, tmp_path / "out")
    found = set(os.listdir(tmp_path / "out"))
    assert found == {*files, "chat_template.jinja", "config.json", SINGLE, "generation_config.json"}
    assert all((tmp_path / "out" / name).read_text() == name for name in files)
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"top_k": 3}'


def test_a_source_that_is_gone_costs_its_tokenizer_only(model: Model, tmp_path: Path) -> None:
    plan = plan_of(model, ONE)
    shards = read(model)
    shutil.rmtree(model.source)
    with pytest.warns(UserWarning, match=r"model is gone: names are those .* no tokenizer to copy"):
        to_huggingface(tmp_path / "out", shards, plan, Alone(), model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(x, model.plain[name]) for name, x in loaded.items())


def test_what_cannot_be_written_is_refused(hub: Hub, tmp_path: Path) -> None:
    model = hub.model("deepseek_v3")
    shards, plan = read(model), plan_of(model, ONE)
    name = next(iter(model.buffers))
    with pytest.raises(ValueError, match=rf"model\.buffers has no {name}"):
        bare = model._replace(buffers={})
        to_huggingface(tmp_path / "out", shards, plan, Alone(), bare)
    other = described(hub.model("olmoe").config, hub.model("olmoe").source, {})
    with pytest.raises(ValueError, match=r"plan and model differ in \['"):
        to_huggingface(tmp_path / "out", shards, plan, Alone(), other)
    assert not (tmp_path / "out").exists()
