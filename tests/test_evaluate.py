"""Evaluation: one mean, however the examples are split over batches and ranks."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from farm import Farm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep import evaluate as module
from functional_ep import init_state, make_evaluate, sgd
from sharding import Comm, Mesh, Plan, make_plan, sharded, simulate, zero3
from sharding.testing import exact, meshes, seeds
from sharding.walk import Backward

PARAMS = {"w": torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)}
ROWS = 11
Batches = Sequence[Tensor]


def plan_on(mesh: Mesh) -> Plan:
    return make_plan(PARAMS, {"w": "dense"}, {"dense": zero3(*mesh.axes)}, mesh)


def squares(view: dict[str, Tensor], x: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Of rows of three: float32 on the way, so that sums of sums would show where they round."""
    errors = (x @ view["w"]) ** 2
    return errors.sum(), len(x), {"above": (errors > 1).sum(), "peak": errors.sum()[None]}


def evaluated(comm: Comm, batches: Batches, backward: Backward = "regather") -> dict[str, Tensor]:
    plan = plan_on(comm.mesh)
    evaluate = make_evaluate(sharded(squares, plan, comm, backward), plan, comm)
    return evaluate(plan.shard(PARAMS, comm), iter(batches))


@st.composite
def splits(draw: st.DrawFn) -> tuple[Mesh, list[list[slice]]]:
    """Rows 0 to ROWS for each rank in batches, of none too, and another number of them each."""
    mesh = draw(meshes(max_ranks=4))
    cuts = sorted(draw(st.lists(st.integers(0, ROWS), max_size=8)))
    parts = [slice(lo, hi) for lo, hi in zip([0, *cuts], [*cuts, ROWS], strict=True)]
    ranks: list[list[slice]] = [[] for _ in mesh]
    for part in parts:
        ranks[draw(st.integers(0, mesh.size - 1))].append(part)
    return mesh, [parts or [slice(0, 0)] for parts in ranks]


def check_split(mesh: Mesh, ranks: list[list[slice]], seed: int) -> None:
    """E1: ``loss = sum over all rows / number of all rows``, on every rank, to the bit."""
    rows = exact((ROWS, 3), seed)
    total, count, aux = squares(PARAMS, rows)
    expected = {"loss": total / count, "count": torch.tensor(count), **aux}
    batches = [[rows[part] for part in parts] for parts in ranks]
    for found in simulate(evaluated, mesh, batches):
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert torch.equal(found[name], x), f"E1: {name} is {found[name]}, not {x}"


@given(splits(), seeds())
def test_the_mean_is_that_of_all_rows(split: tuple[Mesh, list[list[slice]]], seed: int) -> None:
    check_split(*split, seed)


def mean_of_means(sums: Any, more: Any) -> Any:
    return {name: (sums[name] + x) / 2 for name, x in more.items()} if sums else more


def forgets_the_first(sums: Any, more: Any) -> Any:
    return more


@pytest.mark.parametrize("wrong", [mean_of_means, forgets_the_first])
def test_a_wrong_sum_is_rejected(
    wrong: Callable[[Any, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = [[slice(0, 2), slice(2, 3)], [slice(3, ROWS)]]
    check_split(Mesh(ep=2), split, 0)
    monkeypatch.setattr(module, "_add", wrong)
    with pytest.raises(AssertionError, match="E1"):
        check_split(Mesh(ep=2), split, 0)


def test_sums_over_batches_are_wide() -> None:
    """In float32 the ones would vanish beside 2^25."""

    def program(comm: Comm) -> dict[str, Tensor]:
        plan = plan_on(comm.mesh)
        loss = sharded(lambda view, x: (x.sum() + 0 * view["w"].sum().float(), 1), plan, comm)
        batches = [torch.tensor(2.0**25)] + [torch.tensor(1.0)] * 63
        return make_evaluate(loss, plan, comm)(plan.shard(PARAMS, comm), batches)

    (found,) = simulate(program, Mesh())
    assert float(found["loss"]) == (2**25 + 63) / 64


def test_real_ranks_with_other_numbers_of_batches_come_to_the_same(ranks2: Farm) -> None:
    rows, mesh = exact((ROWS, 3), 1), Mesh(ep=2)
    batches = [list(rows[:7].split(2)), [rows[7:]]]
    real, simulated = ranks2.run(evaluated, mesh, batches), simulate(evaluated, mesh, batches)
    for ours, theirs in zip(real, simulated, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def program_of(batches: Any, params: Callable[[Any], Any] = lambda params: params) -> Any:
    def program(comm: Comm) -> Any:
        plan = plan_on(comm.mesh)
        evaluate = make_evaluate(sharded(squares, plan, comm), plan, comm)
        return evaluate(params(plan.shard(PARAMS, comm)), batches(comm.rank))

    return program


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda rank: [torch.ones(1, 3)] * rank, r"rank 0: .*no batch at all; .* an empty one"),
        (lambda rank: [], r"no batch at all"),
        (lambda rank: torch.ones(1, 3), r"one batch found, give it in a list"),
        (lambda rank: {"x": torch.ones(1, 3)}, r"one batch found, give it in a list"),
        (lambda rank: [torch.ones((1, 3), dtype=(torch.float32, torch.float64)[rank])], "differs"),
    ],
)
def test_bad_batches_are_refused(batches: Callable[[int], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(program_of(batches), Mesh(ep=2))


def test_a_state_is_refused_with_what_to_give() -> None:
    plan = plan_on(Mesh(ep=2))
    wrong = program_of(lambda _: [], lambda params: init_state(params, plan, sgd(0.1)))
    with pytest.raises(ValueError, match="a State found, give its params"):
        simulate(wrong, Mesh(ep=2))


def test_names_that_come_and_go_are_refused() -> None:
    def program(comm: Comm) -> Any:
        plan = plan_on(comm.mesh)

        def loss(shards: Any, x: Tensor) -> Any:
            total, count, aux = sharded(squares, plan, comm)(shards, x)
            return total, count, {name: aux[name] for name in list(aux)[: len(x)]}

        batches = [torch.ones(n, 3, dtype=torch.float64) for n in (1, 2)]
        return make_evaluate(loss, plan, comm)(plan.shard(PARAMS, comm), batches)

    with pytest.raises(ValueError, match=r"\['above', 'count', 'loss'\] for one batch"):
        simulate(program, Mesh())


def a_file_that_ends(comm: Comm, batches: Batches) -> list[Any]:
    """Once from a file that ends on rank 1, then from memory: what each comes to."""

    def reading() -> Iterator[Tensor]:
        yield batches[0]
        if comm.rank:
            raise OSError("the file ends here")
        yield from batches[1:]

    plan, results = plan_on(comm.mesh), list[Any]()
    evaluate = make_evaluate(sharded(squares, plan, comm), plan, comm)
    for each in (reading(), batches):
        try:
            results.append(float(evaluate(plan.shard(PARAMS, comm), each)["loss"]))
        except OSError as error:
            results.append(str(error))
    return results


def test_what_fails_on_one_rank_fails_on_all_which_can_go_on(ranks2: Farm) -> None:
    rows, mesh = exact((ROWS, 3), 1), Mesh(ep=2)
    batches = [list(rows[:7].split(2)), [rows[7:]]]
    expected = float(squares(PARAMS, rows)[0] / ROWS)
    for run in (simulate, ranks2.run):
        first, second = run(a_file_that_ends, mesh, batches)
        assert first[1] == second[1] == expected
        assert "rank 1: " in first[0] and "the file ends here" in first[0] and first[0] == second[0]


class Encoding(dict[str, Tensor]):
    """What optree takes for a leaf, as BatchEncoding is."""


Wrap = Callable[[Tensor], Any]
UNUSUAL: dict[str, tuple[Wrap, Callable[[Any], Tensor]]] = {
    "a mapping of a library's own": (lambda x: Encoding(x=x), lambda batch: batch["x"]),
    "mappings inside": (lambda x: {"y": (UserDict(x=x), "a name", 3)}, lambda b: b["y"][0]["x"]),
    "a scalar beside the rows": (lambda x: (x, torch.tensor(1.0)), lambda batch: batch[0]),
}


def check_unusual(wrap: Wrap, unwrap: Callable[[Any], Tensor], spoil: float = 0.0) -> None:
    """The batch is wrapped; ``spoil`` is what each batch has beside its rows, and may be NaN."""
    rows, mesh = exact((ROWS, 3), 3), Mesh(ep=2)
    batches = [[wrap(x) for x in rows[:8].split(2)], [wrap(rows[8:])]]

    def program(comm: Comm, batches: list[Any]) -> Tensor:
        plan = plan_on(comm.mesh)

        def loss(view: dict[str, Tensor], batch: Any) -> Any:
            total, count, aux = squares(view, unwrap(batch))
            return total + (0 if count else spoil), count, aux | {"batches": torch.ones(())}

        metrics = make_evaluate(sharded(loss, plan, comm), plan, comm)(
            plan.shard(PARAMS, comm), batches
        )
        assert int(metrics["batches"]) == 5, "what ended counts for nothing"
        return metrics["loss"]

    for found in simulate(program, mesh, batches):
        assert torch.equal(found, squares(PARAMS, rows)[0] / ROWS)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_has_ended_has_no_rows_in_whatever_they_are(name: str) -> None:
    check_unusual(*UNUSUAL[name])


def test_what_a_loss_makes_of_no_rows_does_not_count() -> None:
    check_unusual(lambda x: x, lambda x: x, spoil=math.nan)


def test_what_rows_cannot_be_left_out_of_is_refused_on_all_ranks_if_they_have_to_be() -> None:
    rows = exact((4, 3), 3)

    def program(comm: Comm) -> Tensor:
        plan = plan_on(comm.mesh)
        loss = sharded(lambda view, x: squares(view, torch.as_tensor(x)), plan, comm)
        batches = [x.numpy() for x in rows.split(2)]
        return make_evaluate(loss, plan, comm)(plan.shard(PARAMS, comm), batches)["loss"]

    for found in simulate(program, Mesh(ep=2)):
        assert torch.equal(found, squares(PARAMS, rows)[0] / 4)
    with pytest.raises(ValueError, match=r"rank 1: batch\['x'\] is a ndarray, of which rows"):
        check_unusual(lambda x: {"x": x.numpy()}, lambda batch: torch.as_tensor(batch["x"]))


def test_aux_of_other_names_on_other_ranks_is_refused() -> None:
    def program(comm: Comm) -> Any:
        plan = plan_on(comm.mesh)

        def loss(shards: Any, x: Tensor) -> Any:
            total, count, aux = sharded(squares, plan, comm)(shards, x)
            return total, count, {f"{name}{comm.rank}": x for name, x in aux.items()}

        batches = [torch.ones(1, 3, dtype=torch.float64)]
        return make_evaluate(loss, plan, comm)(plan.shard(PARAMS, comm), batches)

    with pytest.raises(ValueError, match=r"the loss's aux differs between ranks.*above1"):
        simulate(program, Mesh(ep=2))


def test_nothing_is_recorded_but_under_a_transform_all_is() -> None:
    rows = exact((4, 3), 2)

    def program(comm: Comm) -> Any:
        plan = plan_on(comm.mesh)
        evaluate = make_evaluate(sharded(squares, plan, comm), plan, comm)
        shards = {"w": plan.shard(PARAMS, comm)["w"].requires_grad_()}
        assert not evaluate(shards, [rows])["loss"].requires_grad
        shards = {"w": shards["w"].detach()}
        grads = torch.func.grad(lambda shards: evaluate(shards, [rows])["loss"])(shards)
        return plan.full(grads, comm)["w"]

    expected = torch.func.grad(lambda w: squares({"w": w}, rows)[0] / len(rows))(PARAMS["w"])
    for mesh in (Mesh(), Mesh(ep=2)):
        for found in simulate(program, mesh):
            assert torch.allclose(found, expected, rtol=1e-14)
