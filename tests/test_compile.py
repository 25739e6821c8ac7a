"""compiled(f) = f: on every mesh, in every mode, under every transform; and it does compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import hf_cases
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_leaves_close, assert_rejects
from farm import Farm
from optree import tree_leaves, tree_map
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from functional_ep import adamw, attention, compiled, from_huggingface, lm, uncompiled
from functional_ep.config import Recipe
from functional_ep.differentiate import sum_over_ranks
from functional_ep.memory import StepMemory, step_memory
from functional_ep.program import build
from sharding import Comm, Mesh, expert_parallel, make_plan, simulate, zero3
from sharding.collectives import psum
from sharding.sharded import Backward

CFG = lm.Config(vocab=11, dim=16, layers=2, heads=2, experts=4, top_k=2, ffn=3)
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}
MODES: tuple[Backward, ...] = get_args(Backward)
MESHES = [Mesh(edp=1, ep=1), Mesh(edp=2, ep=2)]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def batch_of(mesh: Mesh, rank: int) -> dict[str, Tensor]:
    """Six sequences, shared out unevenly, some padded: a rank may have none."""
    ids = torch.randint(0, 11, (6, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 3, 7, 7, 1, 5])[:, None]
    cuts = [0, 6] if mesh.size == 1 else [0, 3, 3, 4, 6]
    mine = slice(cuts[rank], cuts[rank + 1])
    labels = torch.where(mask, ids[:, 1:], -100)
    whole = {"input_ids": ids[:, :-1], "labels": labels, "attention_mask": mask}
    return {name: x[mine] for name, x in whole.items()}


def gradient(comm: Comm, mode: Backward, compile: bool) -> dict[str, Tensor]:
    """The mean loss, and its gradient by path."""
    params = lm.init(CFG, dtype=torch.float64)
    plan = make_plan(params, lm.labels, RULES, comm.mesh)
    shards: Any = tree_map(lambda x: x.requires_grad_(), plan.shard(params, comm))
    loss = lm.loss(CFG, plan, comm, mode, compile)
    total, count, _ = loss(shards, batch_of(comm.mesh, comm.rank))
    grads = torch.autograd.grad(total, plan.flatten(shards), materialize_grads=True)
    total, count = sum_over_ranks([total.detach(), count], comm)
    whole = plan.flatten(plan.full(plan.unflatten(list(grads)), comm))
    paths = [leaf.path for leaf in plan.leaves]
    return {"loss": total / count} | {p: g / count for p, g in zip(paths, whole, strict=True)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_gradients_are_those_of_one_process_that_does_not_compile(
    mode: Backward, mesh: Mesh
) -> None:
    (expected,) = simulate(gradient, MESHES[0], ["keep"], [False])
    assert not graphs()
    for found in simulate(gradient, mesh, [mode] * mesh.size, [True] * mesh.size):
        assert_leaves_close(found, expected, f"compiled, {mode} on {mesh}")
    assert graphs()
    name = "blocks/0/attention/qkv"
    assert_rejects(expected[name], expected[name].roll(1, 0), name)


def test_they_are_where_torch_cannot_compile_fused_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "COMPILES_FUSED_FLOAT64", False)

    def program(comm: Comm) -> tuple[dict[str, Tensor], set[str]]:
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            found = gradient(comm, "keep", compile=True)
        return found, {event.name for event in seen.events() or ()}

    (expected,) = simulate(gradient, MESHES[0], ["keep"], [False])
    ((found, names),) = simulate(program, MESHES[0])
    assert_leaves_close(found, expected, "compiled, plain attention")
    assert graphs() and names and not any("flash_attention" in name for name in names)


DERIVATIVES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "grad": lambda f, x, u: torch.func.grad(f)(x),
    "vjp": lambda f, x, u: torch.func.vjp(f, x)[1](torch.ones((), dtype=torch.float64))[0],
    "jvp": lambda f, x, u: torch.func.jvp(f, (x,), (u,))[1],
    "jvp of grad": lambda f, x, u: torch.func.jvp(torch.func.grad(f), (x,), (u,))[1],
    "vmap": lambda f, x, u: torch.vmap(f)(tree_map(lambda a: torch.stack([a, a + 1]), x)),
}


@pytest.mark.parametrize("derivative", list(DERIVATIVES))
def test_transforms_see_the_function_itself(derivative: str) -> None:
    def program(comm: Comm, compile: bool) -> list[Tensor]:
        params = lm.init(CFG, dtype=torch.float64)
        plan = make_plan(params, lm.labels, RULES, comm.mesh)
        loss = lm.loss(CFG, plan, comm, "keep", compile)
        batch = batch_of(comm.mesh, comm.rank)
        shards, moved = (plan.shard(lm.init(CFG, s, torch.float64), comm) for s in (0, 1))
        found = DERIVATIVES[derivative](lambda x: loss(x, batch)[0], shards, moved)
        return tree_leaves(found)

    mesh = Mesh(edp=1, ep=2)
    per_rank = simulate(program, mesh, [False] * 2), simulate(program, mesh, [True] * 2)
    for plain, found in zip(*per_rank, strict=True):
        assert found and all(map(torch.equal, found, plain))
    assert not graphs()


def test_so_do_dual_numbers() -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.zeros(2), torch.ones(2))
        tangent = forward_ad.unpack_dual(compiled(torch.sin)(x)).tangent
    assert tangent is not None and torch.equal(tangent, torch.ones(2))
    assert not graphs()


def test_plain_autograd_cannot_differentiate_twice_and_says_so() -> None:
    x = torch.ones(3, requires_grad=True)
    (g,) = torch.autograd.grad(compiled(torch.sin)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(g.sum(), x)


def test_ranks_meet_in_what_is_left_uncompiled() -> None:
    def program(comm: Comm, leave: Callable[[Any], Any]) -> list[Tensor]:
        everywhere = leave(lambda x: psum(x, ("ep",), comm))
        f = compiled(lambda x: torch.cos(everywhere(torch.sin(x))).sum())
        x = (torch.arange(3.0) + comm.rank).requires_grad_()
        return list(torch.autograd.grad(f(x), x))

    mesh = Mesh(ep=2)
    xs = torch.stack([torch.arange(3.0), torch.arange(3.0) + 1]).requires_grad_()
    total = torch.cos(torch.sin(xs).sum(0)).sum()  # a psum is one value, on every rank
    expected = torch.autograd.grad(total, xs)[0]
    for rank, (found,) in enumerate(simulate(program, mesh, [uncompiled] * 2)):
        torch.testing.assert_close(found, expected[rank])
    assert graphs()
    with pytest.raises(TorchDynamoException) as caught:
        simulate(program, mesh, [lambda f: f] * 2)
    assert "what holds a collective by uncompiled()" in "".join(caught.value.__notes__)


def test_random_numbers_are_those_of_the_function() -> None:
    def f(x: Tensor) -> Tensor:
        return F.dropout(x * 2, 0.5) + torch.rand_like(x)

    def drawn(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 64, requires_grad=True)
        y = run(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    fast, (expected, derivative) = compiled(f), drawn(f)
    for a, b in zip(drawn(fast), (expected, derivative), strict=True):
        assert torch.equal(a, b)
    assert graphs()
    with torch.no_grad():  # the graph of a forward pass alone, as of a block under recompute
        torch.manual_seed(3)
        assert torch.equal(fast(torch.linspace(-1, 1, 64)), expected)


def test_a_step_is_rehearsed_as_it_is_without() -> None:
    params = lm.init(CFG)
    plan = make_plan(params, lm.labels, RULES, Mesh(edp=1, ep=2))
    batch = batch_of(Mesh(), 0)

    def foreseen(compile: bool) -> StepMemory:
        make = partial(lm.loss, CFG, backward="regather", compile=compile)
        return step_memory(lambda plan, comm: make(plan, comm), plan, adamw(1e-3), batch)

    assert foreseen(True) == foreseen(False)
    assert not graphs()


def test_the_training_program_compiles_if_its_recipe_says_so() -> None:
    cfg = replace(CFG, vocab=256)
    ids = torch.arange(32).view(4, 8)
    batch = {"input_ids": ids, "labels": ids + 1}

    def losses(comm: Comm, compile: bool) -> list[float]:
        recipe = Recipe(model=cfg, steps=3, batch=4, seq=8, compile=compile)
        program = build(comm, recipe)
        state, found = program.start(), list[float]()
        for _ in range(3):
            state, metrics = program.step(state, batch)
            found.append(float(metrics["loss"]))
        return found

    (plain,) = simulate(losses, MESHES[0], [False])
    assert not graphs()
    (found,) = simulate(losses, MESHES[0], [True])
    assert found == pytest.approx(plain, rel=1e-6) and plain[-1] < plain[0]
    assert graphs()


# -- models of transformers ------------------------------------------------------------------------

FAMILIES = ("qwen3_moe", "gpt_oss", "llama4_text")


@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_transformers_keeps_its_gradients(mode: Backward) -> None:
    model, mesh = hf_cases.build("mixtral"), Mesh(edp=2, ep=2)
    batch = hf_cases.batch_of(model)
    expected = hf_cases.reference(model, batch)
    found = simulate(lambda comm: hf_cases.converted(comm, model, batch, mode, True), mesh)
    hf_cases.check(found, expected, f"compiled, {mode}")
    assert graphs()


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_other_families_do_too(model_type: str) -> None:
    model = hf_cases.build(model_type)
    batch = hf_cases.batch_of(model)
    expected = hf_cases.reference(model, batch)
    found = simulate(
        lambda comm: hf_cases.converted(comm, model, batch, "regather", True), Mesh(edp=1, ep=2)
    )
    hf_cases.check(found, expected, f"compiled {model_type}")
    assert graphs()


def test_real_ranks_do_too(ranks2: Farm) -> None:
    model = hf_cases.build("mixtral")
    expected = hf_cases.reference(model, hf_cases.batch_of(model))
    arguments = ["mixtral"] * 2, ["regather"] * 2, [True] * 2
    # Two compilers on as many cores: torch 2.11 takes 45 s when nothing else runs.
    found = ranks2.run(hf_cases.converted_type, Mesh(edp=1, ep=2), *arguments, timeout=240.0)
    hf_cases.check(found, expected, "compiled, on two ranks")


def test_what_a_model_records_is_recorded_whenever_it_is_asked_for() -> None:
    whole = hf_cases.build("mixtral")
    ids = hf_cases.batch_of(whole)["input_ids"]

    def program(comm: Comm) -> list[Any]:
        model = from_huggingface(whole)
        plan = hf_cases.plan_of(model, comm.mesh)
        run, shards = model.apply(plan, comm, compile=True), model.load(plan, comm)
        with torch.no_grad():
            asked = [run(shards, input_ids=ids, output_router_logits=i % 2 > 0) for i in range(4)]
        return [outputs.router_logits for outputs in asked]

    expected = whole(input_ids=ids, output_router_logits=True).router_logits
    for found in simulate(program, Mesh(edp=1, ep=2)):
        assert found[0] is None and found[2] is None
        for logits in (found[1], found[3]):
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert graphs()


def test_a_layer_that_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(comm: Comm) -> None:
        model = from_huggingface(hf_cases.build("mixtral"))
        plan = hf_cases.plan_of(model, comm.mesh)
        run = model.apply(plan, comm, compile=True)
        monkeypatch.setattr(MixtralDecoderLayer, "forward", lambda self, x, **_: meet(x, comm))
        run(model.load(plan, comm), input_ids=torch.ones(1, 2, dtype=torch.long))

    def meet(x: Tensor, comm: Comm) -> Tensor:
        return psum(x, ("ep",), comm)

    with pytest.raises(TorchDynamoException) as caught:
        simulate(program, Mesh(edp=1, ep=2))
    assert "model.layers.0 at" in "".join(caught.value.__notes__)


def test_layers_that_read_weights_of_other_parts_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = MixtralDecoderLayer.forward

    def scaled(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(self, hidden_states * self.other[0].weight.mean(), *args, **kwargs)

    monkeypatch.setattr(MixtralDecoderLayer, "forward", scaled)
    model = hf_cases.build("mixtral")
    for layer in model.model.layers:
        layer.other = [model.model.norm]  # in a list, so that it is not the layer's own
    batch = hf_cases.batch_of(model)
    expected = hf_cases.reference(model, batch)
    found = simulate(
        lambda comm: hf_cases.converted(comm, model, batch, "regather", True), Mesh(edp=1, ep=2)
    )
    hf_cases.check(found, expected, "compiled, with weights of another part")
