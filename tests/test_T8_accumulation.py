"""T8: any split into microbatches, uneven and empty ones included, gives the same gradient."""

from __future__ import annotations

from dataclasses import replace

from closeness import assert_close, assert_leaves_close
from hypothesis import given
from hypothesis import strategies as st
from laws import whole_gradient
from torch import Tensor

from functional_ep import lm
from functional_ep.differentiate import accumulate, sum_over_ranks
from functional_ep.testing import Batch, Chosen, Training, prepare, trainings
from sharding import Comm, Mesh, replicated, simulate

Cuts = list[list[int]]


@st.composite
def splits(draw: st.DrawFn) -> tuple[Training, Cuts]:
    """One batch per rank, and where each rank cuts its own: into as many pieces as the others."""
    case = draw(trainings(max_steps=1))
    case = replace(
        case,
        sizes=((case.sizes[0][0],),),
        cfg=replace(case.cfg, balance=0.0),  # its statistics are those of a microbatch
    )
    pieces = draw(st.integers(1, 3))
    cuts = [
        sorted(draw(st.lists(st.integers(0, b), min_size=pieces - 1, max_size=pieces - 1)))
        for b, _ in case.sizes[0][0]
    ]
    return case, cuts


def split(batch: Batch, cuts: list[int]) -> list[Batch]:
    pieces = {name: x.tensor_split(cuts) for name, x in batch.items()}
    return [dict(zip(pieces, each, strict=True)) for each in zip(*pieces.values(), strict=True)]


def gradient(comm: Comm, case: Training, cuts: list[int] | None) -> tuple[dict[str, Tensor], ...]:
    plan, state, _ = prepare(comm, case)
    loss = lm.loss(case.cfg, plan, comm, case.backward)
    shards = plan.check_shards(state.params, comm)
    batch = case.batch(0, 0, comm.rank)
    micros = [batch] if cuts is None else split(batch, cuts)
    grads, total, count, aux = accumulate(loss, plan, shards, micros)
    sums = sum_over_ranks([total, count, *aux.values()], comm)
    named = dict(zip(["total", "count", *aux], sums, strict=True))
    return whole_gradient(plan, grads, comm), named


@given(splits())
def test_any_split_gives_the_same_sums(drawn: tuple[Training, Cuts]) -> None:
    case, cuts = drawn
    case = replace(case, cfg=replace(case.cfg, z=0.0 if case.padded or case.masked else case.cfg.z))
    whole = simulate(gradient, case.mesh, [case] * case.mesh.size, [None] * case.mesh.size)
    cut = simulate(gradient, case.mesh, [case] * case.mesh.size, cuts)
    for (grads, sums), (expected, whole_sums) in zip(cut, whole, strict=True):
        assert_leaves_close(grads, expected, "gradient")
        for name in ("total", "count", "nll", "z", "tokens", "tokens_per_expert"):
            assert_close(sums[name], whole_sums[name], name)


def test_a_step_takes_microbatches() -> None:
    """``step(state, a, b)`` is one step on both, not two steps."""
    case = Training(
        mesh=Mesh(edp=1, ep=1),
        rules={"dense": replicated(), "expert": replicated()},
        cfg=lm.Config(vocab=7, dim=4, layers=1, heads=1, experts=2, top_k=1, ffn=3),
        sizes=((((3, 2),),),),
        optimizers={"dense": Chosen(), "expert": Chosen()},
    )

    def program(comm: Comm) -> tuple[Tensor, Tensor]:
        _, state, step = prepare(comm, case)
        state, metrics = step(state, *split(case.batch(0, 0, 0), [1]))
        return state.step, metrics["count"]

    step, count = simulate(program, case.mesh)[0]
    assert (int(step), int(count)) == (1, 6)
