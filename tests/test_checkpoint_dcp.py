"""What torch.distributed.checkpoint reads and writes, to the bit, and nothing of it is run."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from farm import Farm
from hypothesis import given
from states import Pair, a_plan, alone, pairs, same, state_of
from torch import Tensor

from functional_ep import State, adamw, init_state, sgd
from functional_ep.checkpoint.boxed import _Unpickler
from functional_ep.checkpoint.dcp import from_dcp, to_dcp
from sharding import Comm, Mesh, Plan, make_plan, simulate, zero3
from sharding.testing import seeds
from sharding.tree import flatten


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def saved(path: Path, plan: Plan, seed: int) -> None:
    simulate(lambda comm: to_dcp(path, state_of(plan, comm.rank, seed), plan, comm), plan.mesh)


def named(plan: Plan, state: State) -> dict[str, Tensor]:
    """A state of one rank as others write it: whole tensors, under their names."""
    shapes = {leaf.path: leaf.shape for leaf in plan.leaves}
    shards = zip(plan.leaves, flatten(state.params)[0], strict=True)
    found = {f"params.{leaf.path}": x.view(leaf.shape) for leaf, x in shards}
    for moments in state.opt.values():
        for name, by_path in moments.items():
            found |= {f"opt.{name}.{path}": x.view(shapes[path]) for path, x in by_path.items()}
    return found | {"step": state.step}


@given(pairs(), seeds())
def test_what_we_write_is_read_on_any_mesh(
    tmp_path_factory: pytest.TempPathFactory, pair: Pair, seed: int
) -> None:
    path = tmp_path_factory.mktemp("dcp") / "x"
    saved(path, pair.old, seed)
    found = simulate(lambda comm: from_dcp(path, pair.new, comm), pair.new.mesh)
    for rank, state in enumerate(found):
        assert same(state, state_of(pair.new, rank, seed))


def test_the_stock_library_reads_what_we_write(tmp_path: Path) -> None:
    saved(tmp_path / "x", a_plan(), 5)
    expected = named(alone(), state_of(alone(), 0, 5))
    found = {name: torch.full_like(x, 9) for name, x in expected.items()}
    stock.load(found, checkpoint_id=tmp_path / "x", no_dist=True)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
    nested = {"params": {name: torch.full_like(x, 9) for name, x in alone_params().items()}}
    stock.load(nested, checkpoint_id=tmp_path / "x", no_dist=True)
    assert all(torch.equal(nested["params"][name], x) for name, x in alone_params().items())


def alone_params() -> dict[str, Tensor]:
    named_ = named(alone(), state_of(alone(), 0, 5))
    return {name[7:]: x for name, x in named_.items() if name.startswith("params.")}


@pytest.mark.parametrize("step", [torch.tensor(5), 5], ids=["tensor", "number"])
def test_we_read_what_the_stock_library_writes(step: Any, tmp_path: Path) -> None:
    tensors = {**named(alone(), state_of(alone(), 0, 5)), "step": step, "more": torch.ones(3)}
    stock.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    plan = a_plan(Mesh(edp=3, ep=2))
    for rank, state in enumerate(simulate(lambda comm: from_dcp(tmp_path, plan, comm), plan.mesh)):
        assert same(state, state_of(plan, rank, 5))


W = torch.arange(35.0).view(7, 5)


def save_sharded(comm: Comm, path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    warnings.simplefilter("ignore")
    x = {"w": distribute_tensor(W, mesh, [Shard(0)]), "v": distribute_tensor(W, mesh, [Shard(1)])}
    stock.save(x, checkpoint_id=path)


def test_we_read_chunks_of_many_ranks(ranks2: Farm, tmp_path: Path) -> None:
    ranks2.run(save_sharded, Mesh(ep=2), [tmp_path] * 2)
    params = {"w": W, "v": W}
    plan = make_plan(params, dict.fromkeys(params, "x"), {"x": zero3("edp")}, Mesh(edp=3))

    def program(comm: Comm) -> Any:
        state = from_dcp(tmp_path, plan, comm, moments=(), name_of=lambda role, path: path)
        assert state.opt == {"x": {}} and int(state.step) == 0
        return plan.full(state.params, comm)

    for found in simulate(program, plan.mesh):
        assert torch.equal(found["w"], W) and torch.equal(found["v"], W)


def half(moments: torch.dtype, mesh: Mesh) -> tuple[Plan, Callable[[Comm], State]]:
    """Parameters in bfloat16 whose moments are of another dtype, or of the same."""
    params = {"w": (W / 7).bfloat16(), "b": torch.tensor([1 / 3]).bfloat16()}
    plan = make_plan(params, dict.fromkeys(params, "x"), {"x": zero3("edp")}, mesh)

    def state(comm: Comm) -> State:
        params_ = plan.shard(params, comm)
        opt = {
            name: {path: x.to(moments) / part for path, x in params_.items()}
            for name, part in (("m", 3), ("v", 11))
        }
        return State(torch.tensor(3), params_, {"x": opt})

    return plan, state


@pytest.mark.parametrize("moments", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_keep_their_dtype_and_their_bits(tmp_path: Path, moments: torch.dtype) -> None:
    (old, made), (new, expected) = (half(moments, mesh) for mesh in (Mesh(edp=2), Mesh(edp=3)))
    simulate(lambda comm: to_dcp(tmp_path / "x", made(comm), old, comm), old.mesh)

    def program(comm: Comm) -> None:
        found = from_dcp(tmp_path / "x", new, comm)
        assert same(found, expected(comm))
        assert found.opt["x"]["m"]["w"].dtype == moments
        planted = {name: x.bfloat16().to(moments) for name, x in found.opt["x"]["m"].items()}
        same_bits = same(planted, expected(comm).opt["x"]["m"])
        assert same_bits == (moments == torch.bfloat16), "rounded moments are others"

    simulate(program, new.mesh)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_cast_converts_moments_that_are_like_their_parameter(
    tmp_path: Path, moments: torch.dtype
) -> None:
    old, made = half(moments, Mesh(edp=1))
    simulate(lambda comm: to_dcp(tmp_path / "x", made(comm), old, comm), old.mesh)
    params = {"w": W.double(), "b": torch.ones(1).double()}
    plan = make_plan(params, dict.fromkeys(params, "x"), {"x": zero3("edp")}, Mesh(edp=1))
    with pytest.raises(ValueError, match=r"params of params\['b'\] .*float64 expected.*bfloat16"):
        load(tmp_path / "x", plan)
    (found,) = load(tmp_path / "x", plan, cast=True)
    like = torch.float64 if moments == torch.bfloat16 else moments
    assert found.params["w"].dtype == torch.float64
    assert {x.dtype for by_path in found.opt["x"].values() for x in by_path.values()} == {like}
    with pytest.raises(ValueError, match=r"z of params\['b'\] \(1,\): .* no tensor 'opt.z.b'"):
        load(tmp_path / "x", plan, cast=True, moments=("z",))


PARAMS = {"a": torch.randn(6), "b": torch.randn(4, 2), "c": torch.randn(3)}
LABELS, SPLIT = {"a": "A", "b": "B", "c": "C"}, dict.fromkeys("ABC", zero3("edp"))


def of_three_optimizers(mesh: Mesh) -> tuple[Plan, Callable[[Comm], State]]:
    """Labels with two moments, with one and with none; every number is another one."""
    plan = make_plan(PARAMS, LABELS, SPLIT, mesh)
    optimizers = {"A": adamw(0.1), "B": sgd(0.1, momentum=0.9), "C": sgd(0.1)}

    def state(comm: Comm) -> State:
        begun = init_state(plan.shard(PARAMS, comm), plan, optimizers)
        for moments in begun.opt.values():
            for i, by_path in enumerate(moments.values()):
                for path, x in by_path.items():
                    x.copy_(begun.params[path] * (i + 2))
        return begun

    return plan, state


def test_labels_keep_the_moments_of_their_own_optimizers(tmp_path: Path) -> None:
    (old, made), (new, expected) = (
        of_three_optimizers(mesh) for mesh in (Mesh(edp=2), Mesh(edp=3))
    )
    simulate(lambda comm: to_dcp(tmp_path / "x", made(comm), old, comm), old.mesh)

    def names(role: str, path: str) -> str:
        return f"{path}/{role}"

    simulate(lambda comm: to_dcp(tmp_path / "y", made(comm), old, comm, name_of=names), old.mesh)

    def program(comm: Comm) -> None:
        assert same(from_dcp(tmp_path / "x", new, comm), expected(comm))
        assert same(from_dcp(tmp_path / "x", new, comm, moments=("v", "m")), expected(comm))
        found = from_dcp(tmp_path / "y", new, comm, moments=("m", "v"), name_of=names)
        assert same(found, expected(comm))
        found = from_dcp(tmp_path / "x", new, comm, moments=("v",)).opt
        assert {label: list(its) for label, its in found.items()} == {"A": ["v"], "B": [], "C": []}
        assert from_dcp(tmp_path / "x", new, comm, moments=()).opt == {"A": {}, "B": {}, "C": {}}

    simulate(program, new.mesh)
    with pytest.raises(ValueError, match=r"z of params\['a'\] \(6,\): .* no tensor 'opt.z.a'"):
        load(tmp_path / "x", new, moments=("m", "z"))
    with pytest.raises(ValueError, match=r"with a name_of, .* such as moments=\('m', 'v'\)"):
        load(tmp_path / "y", new, name_of=names)
    one = make_plan(PARAMS, dict.fromkeys(PARAMS, "A"), {"A": zero3()}, Mesh())
    with pytest.raises(ValueError, match=r"'a' has the moments \['m', 'v'\] and 'b' has \['m'\]"):
        load(tmp_path / "x", one)


def test_a_moment_is_not_taken_for_a_path(tmp_path: Path) -> None:
    """``m.a`` of ``w`` would be ``m`` of ``a/w``, and nobody would miss it."""
    plan = make_plan({"w": W}, {"w": "x"}, {"x": zero3()}, Mesh())
    state = State(torch.tensor(1), {"w": W.view(-1)}, {"x": {"m.a": {"w": W.view(-1)}}})
    with pytest.raises(
        ValueError, match=r"moment 'm\.a' would be taken for a path: give a name_of"
    ):
        simulate(lambda comm: to_dcp(tmp_path / "x", state, plan, comm), plan.mesh)
    assert list(tmp_path.iterdir()) == []


# -- what is refused -------------------------------------------------------------------------------


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def load(path: Path, plan: Plan | None = None, **options: Any) -> list[State]:
    plan = plan or alone()
    return simulate(lambda comm: from_dcp(path, plan, comm, **options), plan.mesh)


def test_a_pickle_that_does_something_is_refused(tmp_path: Path) -> None:
    path, boom = tmp_path / "x", tmp_path / "boom"
    saved(path, a_plan(), 5)
    bombs = [pickle.dumps(Bomb(boom), protocol) for protocol in (0, 2, 4)]
    bombs.append(b"cbuiltins\neval\n(S'1'\ntR.")
    bombs.append(b"ctorch\nload\n(S'x'\ntR.")
    for bomb in bombs:
        (path / ".metadata").write_bytes(bomb)
        with pytest.raises(ValueError, match=r"\.metadata cannot .*it asks for .*no part of"):
            load(path)
        assert not boom.exists()
    pickle.loads(bombs[0])
    assert boom.exists(), "the bomb is one"


def test_a_tensor_that_does_something_is_refused(tmp_path: Path) -> None:
    path, boom = tmp_path / "x", tmp_path / "boom"
    torch.save(Bomb(boom), tmp_path / "bomb")
    saved(path, alone(), 5)
    content = (tmp_path / "bomb").read_bytes()
    payload = path / "__0_0.distcp"
    payload.write_bytes(content.ljust(payload.stat().st_size, b"\0"))
    with pytest.raises(ValueError, match=r"__0_0\.distcp cannot be read"):
        load(path)
    assert not boom.exists()


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match=r"it has no \.metadata"):
        load(path)
    saved(path, a_plan(), 5)
    with pytest.raises(FileExistsError, match="x exists: choose another path"):
        saved(path, a_plan(), 6)
    with pytest.raises(ValueError, match=r"\(4, 3\): .* has no tensor 'opt.z.w'; it has \['step'"):
        load(path, moments=("z",))
    params = {leaf.path: torch.empty(leaf.shape, dtype=leaf.dtype) for leaf in alone().leaves}

    def plan(**changes: Tensor) -> Plan:
        its = {**params, **changes}
        return make_plan(its, dict.fromkeys(its, "x"), {"x": zero3()}, Mesh(), frozen=("x",))

    with pytest.raises(ValueError, match=r"\(9,\) expected, but 'params.w' in .* is \(4, 3\)"):
        load(path, plan(w=torch.empty(9)))
    narrow = plan(w=torch.empty(4, 3))
    with pytest.raises(ValueError, match=r"float32 expected, but .* is torch.float64: .*cast=True"):
        load(path, narrow)
    assert load(path, narrow, cast=True)[0].params["w"].dtype == torch.float32
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata["params.w"].chunks.pop()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"chunks of 'params.w' in .* hold \d+ of the 12 entries"):
        load(path, plan())
    payload = path / "__0_0.distcp"
    payload.write_bytes(payload.read_bytes()[:99])
    with pytest.raises(ValueError, match=r"__0_0\.distcp is truncated"):
        load(path, plan())


def test_two_tensors_do_not_share_a_name(tmp_path: Path) -> None:
    params = {"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2)}
    plan = make_plan(params, {"a": {"b": "x"}, "a.b": "x"}, {"x": zero3()}, Mesh(edp=2))

    def program(comm: Comm) -> None:
        state = State(torch.tensor(1), plan.shard(params, comm), {"x": {}})
        with pytest.raises(ValueError, match=r"'a/b' and .* 'a\.b' would both be 'params\.a\.b'"):
            to_dcp(tmp_path / "x", state, plan, comm)
        to_dcp(tmp_path / "y", state, plan, comm, name_of=lambda role, path: f"{role}/{path}")

    simulate(program, plan.mesh)
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def program(comm: Comm) -> None:
        state = state_of(a_plan(), comm.rank, 5)
        wrong = state._replace(opt={}) if comm.rank == 1 else state
        to_dcp(tmp_path / "x", wrong, a_plan(), comm)

    def nameless(role: str, path: str) -> str:
        raise KeyError(path)

    with pytest.raises(ValueError, match="rank 1: the state has optimizer states for"):
        simulate(program, a_plan().mesh)
    with pytest.raises(KeyError, match="b"):
        simulate(
            lambda comm: to_dcp(
                tmp_path / "x", state_of(alone(), 0, 5), alone(), comm, name_of=nameless
            ),
            Mesh(),
        )
    assert list(tmp_path.iterdir()) == []


def test_structures_nest(tmp_path: Path) -> None:
    params = {"blocks": [{"w": torch.ones(2, 2)}, {"w": torch.zeros(3)}]}
    labels = {"blocks": [{"w": "x"}, {"w": "x"}]}
    plan = make_plan(params, labels, {"x": zero3("ep")}, Mesh(ep=2))
    saved(tmp_path / "x", plan, 1)
    found = {"params.blocks.0.w": torch.empty(2, 2), "params.blocks.1.w": torch.empty(3)}
    stock.load(found, checkpoint_id=tmp_path / "x", no_dist=True)
    full = simulate(lambda c: plan.full(state_of(plan, c.rank, 1).params, c), plan.mesh)[0]
    assert torch.equal(found["params.blocks.0.w"], full["blocks"][0]["w"])
    assert torch.equal(found["params.blocks.1.w"], full["blocks"][1]["w"])


def test_a_path_is_one_whatever_python_wrote_it() -> None:
    written = b"cpathlib._local\nPosixPath\n."
    assert _Unpickler(io.BytesIO(written)).load() is PosixPath
