"""What loading and writing cost: the bytes that a rank reads, and what it holds at a time."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from farm import Farm
from hub import FAMILIES, RULES, Alone, Hub, Model, config_of, described, plan_of, skeleton_of
from safetensors.torch import load_file
from torch import Tensor

from functional_ep import safetensors_file, to_huggingface
from functional_ep.huggingface.files import Files, write_headers
from functional_ep.huggingface.lazy import Lazy, read
from functional_ep.huggingface.load import load
from functional_ep.huggingface.names import Module, to_hub
from functional_ep.safetensors_file import PIECE
from sharding import Comm, Mesh, Plan, simulate

LARGE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "moe_intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_experts": 16,
    "num_local_experts": 16,
    "num_attention_heads": 8,
    "head_dim": 64,
}
MESH = Mesh(edp=2, ep=2)
RANK = 1
Loader = Callable[[Model, Plan, Comm], dict[str, Tensor]]


def ours(model: Model, plan: Plan, comm: Comm) -> dict[str, Tensor]:
    return load(model.skeleton, model.source, plan, comm)


def everything_first(model: Model, plan: Plan, comm: Comm) -> dict[str, Tensor]:
    """The planted wrong loader: right numbers, from a state dict in memory."""
    whole = {}
    for file in sorted(Path(model.source).glob("*.safetensors")):
        whole |= {name: x.clone() for name, x in load_file(file).items()}
    return load(model.skeleton, whole, plan, comm)


def whole_leaves(model: Model, plan: Plan, comm: Comm) -> dict[str, Tensor]:
    """Another: what one rank alone would hold, and then this rank's share of it."""
    full = ours(model, plan_of(model, Mesh(edp=1, ep=1)), Alone())
    shapes = {leaf.path: leaf.shape for leaf in plan.leaves}
    return plan.shard({name: x.view(shapes[name]) for name, x in full.items()}, comm)


def size_of(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.itemsize for x in tensors.values())


# -- bytes read ----------------------------------------------------------------------------------


def bytes_read(model: Model, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For each rank what it reads of the payload, as a multiple of the numbers of its shards."""
    right, count = safetensors_file.read_into, [0]

    def counting(path: Path, start: int, out: Tensor) -> int:
        count[0] += out.numel() * out.itemsize
        return right(path, start, out)

    def program(comm: Comm) -> float:
        count[0] = 0  # no collective: ranks run one after another
        plan = plan_of(model, comm.mesh)
        share = size_of(loader(model, plan, comm))
        return count[0] / share

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "read_into", counting)
        return simulate(program, MESH)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    return Hub(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "olmoe"])
def test_a_rank_reads_its_share_and_nothing_else(
    hub: Hub, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for multiple in bytes_read(hub.model(family), ours, monkeypatch):
        assert multiple <= 1.0  # less where shards are padded


def test_a_loader_of_whole_leaves_is_found(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(bytes_read(hub.model("mixtral"), whole_leaves, monkeypatch)) > 3.5


@pytest.mark.skipif("inkling2_text" not in FAMILIES, reason="an older transformers")
def test_what_is_reshaped_costs_one_tensor_more(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(bytes_read(hub.model("inkling2_text"), ours, monkeypatch)) < 2.0


# -- memory --------------------------------------------------------------------------------------


def growth(action: Callable[[], Any]) -> int:
    """By how many bytes the memory of this process grows at most while it acts."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    kept = action()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def large_model(folder: Path) -> Model:
    """A directory of 300 MB that takes no disk: files of headers, and holes for the numbers."""
    config = config_of("qwen3_moe", **LARGE)
    skeleton = skeleton_of(config)
    module = Module(skeleton)
    leaves = {name: Lazy.stored(x.shape, x.dtype, _zero) for name, x in module.expected.items()}
    if not folder.exists():
        folder.mkdir()
        write_headers(folder, Files.split(to_hub(module, leaves, None), "100MB", "model"), module)
        config.save_pretrained(folder)
    return described(config, folder, {})


def _zero(out: Tensor, box: Any) -> None:
    out.zero_()


def layer_of(model: Model) -> int:
    return size_of({n: x for n, x in model.shapes.items() if n.startswith("model.layers.0.")})


def load_growth(folder: Path, loader: Loader, dtype: torch.dtype | None) -> tuple[int, int, int]:
    """Growth while one of four ranks loads, its share, and a layer."""
    model = large_model(folder)
    plan = plan_of(model, MESH, RULES, dtype)

    def program(comm: Comm) -> tuple[int, int, int] | None:
        if comm.rank != RANK:
            return None
        loader(described(config_of("qwen3_moe"), tiny_source, {}), tiny_plan, comm)  # warm caches
        shards: dict[str, Tensor] = {}
        grown = growth(lambda: shards.update(loader(model, plan, comm)))
        return grown, size_of(shards), layer_of(model)

    with_tiny = Hub(folder.parent / "tiny")
    tiny = with_tiny.model("qwen3_moe")
    tiny_source, tiny_plan = tiny.source, plan_of(tiny, MESH)
    result = simulate(program, MESH)[RANK]
    assert result is not None
    return result


LOADERS: dict[str, Loader] = {
    "ours": ours,
    "everything first": everything_first,
    "whole leaves": whole_leaves,
}
DTYPES = {"as stored": None, "cast": torch.bfloat16}


def in_a_process(folder: Path, loader: str, dtype: str) -> tuple[int, int, int]:
    """Memory is measured in a process that has nothing else to do."""
    code = (
        "from pathlib import Path; import test_weights_memory as t\n"
        f"print(*t.load_growth(Path({str(folder)!r}), t.LOADERS[{loader!r}], t.DTYPES[{dtype!r}]))"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    prelude = f"import sys; sys.path[:0] = {paths}\n"
    output = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, check=True
    ).stdout
    grown, share, layer = map(int, output.split())
    return grown, share, layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_holds_the_share_and_at_most_a_layer(tmp_path: Path, dtype: str) -> None:
    grown, share, layer = in_a_process(tmp_path / "large", "ours", dtype)
    assert share > 2 * layer / 3 > 2 * PIECE / 3
    assert grown <= 1.3 * share + layer


@pytest.mark.parametrize("loader", ["everything first", "whole leaves"])
def test_a_loader_that_holds_the_model_is_found(tmp_path: Path, loader: str) -> None:
    grown, share, layer = in_a_process(tmp_path / "large", loader, "as stored")
    assert grown > 1.3 * share + layer


def write_growth(comm: Comm, folder: Path, path: Path, whole_first: bool) -> tuple[int, int]:
    """Growth while all ranks write, and a layer."""
    torch.set_num_threads(1)
    model = large_model(folder)
    plan = plan_of(model, comm.mesh)
    shards = load(model.skeleton, model.source, plan, comm)

    def write() -> Any:
        held = plan.full(shards, comm) if whole_first else None
        to_huggingface(path, shards, plan, comm, model)
        return held

    return growth(write), layer_of(model)


@pytest.fixture
def fresh() -> Iterator[Farm]:
    """Processes that have no memory left over from other tests."""
    with Farm(2) as farm:
        yield farm


@pytest.mark.parametrize("mesh", [Mesh(edp=2, ep=1), Mesh(edp=1, ep=2)])
@pytest.mark.parametrize("whole_first", [False, True])
def test_writing_holds_about_a_layer_beyond_the_share(
    fresh: Farm, tmp_path: Path, mesh: Mesh, whole_first: bool
) -> None:
    large_model(tmp_path / "large")
    arguments = [[a] * 2 for a in (tmp_path / "large", tmp_path / "out", whole_first)]
    for grown, layer in fresh.run(write_growth, mesh, *arguments):
        assert (grown <= 1.25 * layer + 2 * PIECE) != whole_first, (grown / layer, math.nan)


def test_a_tensor_of_holes_reads_as_zeros(tmp_path: Path) -> None:
    model = large_model(tmp_path / "large")
    plan = plan_of(model, MESH)
    shard = simulate(lambda comm: ours(model, plan, comm)["lm_head.weight"][:9], MESH)[RANK]
    assert torch.equal(shard, torch.zeros(9))
    assert torch.equal(read(Lazy.stored((3,), torch.float32, _zero), 0, 3), torch.zeros(3))
