"""T14: load then dump is the identity, for every family, mesh and rule; what transformers reads."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from farm import Farm
from hub import (
    FAMILIES,
    MANY,
    RULES,
    Alone,
    Hub,
    Model,
    config_of,
    plan_of,
    random_model,
    rules_and_meshes,
)
from hypothesis import find, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from functional_ep import from_huggingface, to_huggingface
from functional_ep.huggingface import dump, names
from functional_ep.huggingface.load import load
from sharding import Comm, Mesh, Plan, Rule, interval, make_plan, simulate
from sharding.gather import Layout

MESHES = [Mesh(edp=edp, ep=ep) for edp, ep in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4))]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    return Hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """So that every rank writes a part of the files of tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dump, "PIECE", 512)
        yield


@pytest.fixture
def place() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder) / "out"


def there_and_back(comm: Comm, model: Model, plan: Plan, path: Path, size: str) -> Any:
    """What the ranks load, put together; and the directory that they write of it."""
    shards = load(model.skeleton, model.source, plan, comm)
    to_huggingface(path, shards, plan, comm, model, max_shard_size=size)
    return plan.full(shards, comm)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names in which two state dicts are not the same bits."""
    return [name for name in found if not torch.equal(found[name], expected[name])]


def differing_files(a: Path, b: Path) -> list[str]:
    both = sorted({*os.listdir(a), *os.listdir(b)})
    return [name for name in both if name not in filecmp.cmpfiles(a, b, both, shallow=False)[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_there_and_back_is_the_same_bytes(hub: Hub, family: str, place: Path) -> None:
    model = hub.model(family)
    for i, mesh in enumerate(MESHES):
        path = place / str(i)
        arguments = (model, plan_of(model, mesh), path, "50GB")
        for found in simulate(there_and_back, mesh, *([each] * mesh.size for each in arguments)):
            assert not differing(found, model.plain)
        assert not differing_files(model.source, path), mesh
    again = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert not differing(again, model.plain) and again.keys() == model.plain.keys()


@settings(max_examples=30)
@given(st.sampled_from(sorted(set(FAMILIES) - {"qwen3_moe"})), rules_and_meshes())
def test_on_any_mesh_under_any_rule(hub: Hub, family: str, where: Any) -> None:
    (rules, mesh), model = where, hub.model(family)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        arguments = (model, plan_of(model, mesh, rules), path, "50GB")
        for found in simulate(there_and_back, mesh, *([each] * mesh.size for each in arguments)):
            assert not differing(found, model.plain)
        assert not differing_files(model.source, path)


def test_the_rules_and_meshes_are_the_hard_ones() -> None:
    def is_hard(where: Any) -> bool:
        rules, mesh = where
        split, stored = (
            mesh.count(axes) > 1 for axes in (rules["expert"].compute, rules["expert"].store)
        )
        return split and stored and mesh.count(rules["dense"].store) not in (1, mesh.size)

    find(rules_and_meshes(), is_hard)
    find(rules_and_meshes(), lambda where: where[1].count(where[0]["dense"].store) % 3 == 0)


def another_rank(rule: Rule, mesh: Mesh, rank: int, shape: tuple[int, ...]) -> tuple[int, int]:
    return interval(rule, mesh, (rank + 1) % mesh.size, shape)


def shifted(rule: Rule, mesh: Mesh, rank: int, shape: tuple[int, ...]) -> tuple[int, int]:
    lo, hi = interval(rule, mesh, rank, shape)
    return (lo - 1, hi - 1) if lo else (lo, hi)


@pytest.mark.parametrize("wrong", [another_rank, shifted])
def test_a_loader_of_another_interval_is_found(
    hub: Hub, place: Path, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "interval", lambda w, rank: wrong(w.rule, w.mesh, rank, w.shape))
    model = hub.model("mixtral")
    arguments = (model, plan_of(model, MESHES[3]), place, "50GB")
    for found in simulate(there_and_back, MESHES[3], *([each] * 4 for each in arguments)):
        assert len(differing(found, model.plain)) > len(model.shapes) / 2
    assert differing_files(model.source, place)


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_does_not_write_is_found(
    hub: Hub, place: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = dump._Writer.write

    def lazy(writer: Any, names: list[str]) -> None:
        right(writer, names if writer.comm.rank != rank else [])

    monkeypatch.setattr(dump._Writer, "write", lazy)
    model = hub.model("mixtral")
    arguments = (model, plan_of(model, MESHES[3]), place, "50GB")
    simulate(there_and_back, MESHES[3], *([each] * 4 for each in arguments))
    assert differing_files(model.source, place) == ["model.safetensors"]


def test_comparing_notices_one_number_in_one_expert(hub: Hub, place: Path) -> None:
    model = hub.model("mixtral")

    def program(comm: Comm) -> Any:
        plan = plan_of(model, comm.mesh)
        shards = load(model.skeleton, model.source, plan, comm)
        expert = next(name for name, label in model.labels.items() if label == "expert")
        shards[expert][0] += 2**-20 if comm.rank == 3 else 0
        to_huggingface(place, shards, plan, comm, model)
        return plan.full(shards, comm)

    assert differing(simulate(program, MESHES[3])[0], model.plain)
    assert differing_files(model.source, place) == ["model.safetensors"]


def test_experts_are_in_the_order_of_their_numbers(
    hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hub.model("qwen3_moe")
    assert model.config.num_experts == MANY > 10
    monkeypatch.setattr(names, "dot_natural_key", lambda name: name)  # 10 before 2
    arguments = (model, plan_of(model, MESHES[0]), place, "50GB")
    with pytest.raises(ValueError, match=r"experts\.2\.\w+\.weight is missing"):
        simulate(there_and_back, MESHES[0], *([each] for each in arguments))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_several_files(hub: Hub, family: str, place: Path) -> None:
    model = hub.model(family, "10KB")
    assert (model.source / "model.safetensors.index.json").exists()
    arguments = (model, plan_of(model, MESHES[3]), place, "10KB")
    for found in simulate(there_and_back, MESHES[3], *([each] * 4 for each in arguments)):
        assert not differing(found, model.plain)
    assert (place / "model.safetensors.index.json").exists()
    assert not differing(AutoModelForCausalLM.from_pretrained(place).state_dict(), model.plain)


@pytest.mark.parametrize("what", ["module", "state dict of the module", "state dict of the hub"])
def test_weights_in_memory(hub: Hub, what: str, place: Path) -> None:
    from safetensors.torch import load_file

    model = hub.model("mixtral")
    module = AutoModelForCausalLM.from_pretrained(model.source)
    source = {
        "module": module,
        "state dict of the module": module.state_dict(),
        "state dict of the hub": load_file(model.source / "model.safetensors"),
    }[what]
    model = model._replace(source=source)
    arguments = (model, plan_of(model, MESHES[3]), place, "50GB")
    for found in simulate(there_and_back, MESHES[3], *([each] * 4 for each in arguments)):
        assert not differing(found, model.plain)
    assert not differing(AutoModelForCausalLM.from_pretrained(place).state_dict(), model.plain)
    shards = load(model.skeleton, source, plan_of(model, MESHES[0]), Alone())
    shared = {x.untyped_storage().data_ptr() for x in shards.values()}
    assert not shared & {x.untyped_storage().data_ptr() for x in source_tensors(source)}


def source_tensors(source: Any) -> Any:
    return source.parameters() if isinstance(source, torch.nn.Module) else source.values()


@pytest.mark.parametrize(
    ("stored", "asked"), [("bfloat16", torch.float32), ("float32", torch.bfloat16)]
)
def test_numbers_are_cast_to_the_dtype_of_the_plan(
    hub: Hub, stored: str, asked: torch.dtype, place: Path
) -> None:
    model = hub.model("deepseek_v3", dtype=stored)
    plan = plan_of(model, MESHES[3], dtype=asked)

    arguments = (model, plan, place, "50GB")
    expected = {name: x.to(asked) for name, x in model.plain.items()}
    (_, found, *_) = simulate(there_and_back, MESHES[3], *([each] * 4 for each in arguments))
    assert not differing(found, expected)
    again = AutoModelForCausalLM.from_pretrained(place)
    assert again.dtype == asked and not differing(dict(again.named_parameters()), expected)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_masters_are_written_in_the_dtype_that_is_asked_for(
    hub: Hub, place: Path, family: str
) -> None:
    """bfloat16 in, float32 masters, bfloat16 out: the very numbers that were read.

    Constants keep the dtype that the model computes with, which some transformers widen.
    """
    model = hub.model(family, dtype="bfloat16")
    plan = plan_of(model, Mesh(edp=2, ep=2), dtype=torch.float32)

    def program(comm: Comm) -> None:
        shards = load(model.skeleton, model.source, plan, comm)
        to_huggingface(place, shards, plan, comm, model, dtype=torch.bfloat16)

    simulate(program, plan.mesh)
    before, after = (load_file(path / "model.safetensors") for path in (model.source, place))
    assert set(after) == set(before)
    for name, x in before.items():
        assert torch.equal(after[name].to(x.dtype), x), name
        assert after[name].dtype == torch.bfloat16 or name in model.buffers, name
    assert AutoModelForCausalLM.from_pretrained(place).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_tensor_is_written_in_its_own_dtype(place: Path, family: str) -> None:
    """A float32 router in a bfloat16 model, as transformers writes it, to the byte."""
    plain = random_model(config_of(family)).bfloat16()
    for layer in plain.model.layers:
        router = next(module for name, module in layer.mlp.named_children() if name != "experts")
        torch.nn.init.normal_(router.float().weight)
    plain.save_pretrained(place / "theirs")
    model = from_huggingface(plain)

    def program(comm: Comm) -> None:
        plan = make_plan(model.shapes, model.labels, RULES, comm.mesh)
        to_huggingface(place / "ours", model.load(plan, comm), plan, comm, model)

    simulate(program, Mesh(edp=2, ep=2))
    assert not differing_files(place / "theirs", place / "ours")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_module_are_understood_as_well(hub: Hub, family: str) -> None:
    model, comm = hub.model(family), Alone()
    found = load(model.skeleton, model.plain, plan_of(model, comm.mesh), comm)
    assert not differing(found, {name: model.plain[name].reshape(-1) for name in found})


def test_shards_go_to_the_device_of_their_rank(hub: Hub) -> None:
    model, comm = hub.model("mixtral"), Alone()
    comm.device = torch.device("meta")
    found = load(model.skeleton, model.source, plan_of(model, comm.mesh), comm)
    assert {x.device for x in found.values()} == {comm.device}


def on_a_real_rank(comm: Comm, model: Model, path: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dump, "PIECE", 512)
        found = there_and_back(comm, model, plan_of(model, comm.mesh), path, "10KB")
    return differing(found, model.plain)


@pytest.mark.parametrize("mesh", [Mesh(edp=2, ep=1), Mesh(edp=1, ep=2)])
def test_real_ranks(hub: Hub, ranks2: Farm, mesh: Mesh, place: Path) -> None:
    model = hub.model("glm4_moe", "10KB")
    assert ranks2.run(on_a_real_rank, mesh, [model] * 2, [place] * 2) == [[], []]
    assert not differing(AutoModelForCausalLM.from_pretrained(place).state_dict(), model.plain)
