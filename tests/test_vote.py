"""The vote: a step is taken on all ranks or on none, for the right reason, and costs no bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from budget import one_in
from farm import Farm
from faults import FAULTS, MESH, OPTIMIZER, Arena, Fault, Place, flip, make_batch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep import Reason, State, Vetoed, Vote, bits, make_train_step, poll, vetoes_in_a_row
from functional_ep import why as why_vetoed
from functional_ep.testing import Training, train, trainings
from functional_ep.vote import WHY
from sharding import Comm, Mesh, simulate
from sharding.comm import Op
from sharding.mesh import Axes
from sharding.order import Order
from sharding.testing import seeds
from sharding.tree import flatten, unflatten

POSITION = Vote("skip", position=lambda batch: batch["at"])


def same(a: Any, b: Any) -> bool:
    (xs, xs_spec), (ys, ys_spec) = flatten(a), flatten(b)
    return xs_spec == ys_spec and all(
        (x.dtype, x.shape) == (y.dtype, y.shape)
        and torch.equal(*(bits.in_order(z.detach().reshape(-1)).view(torch.uint8) for z in (x, y)))
        for x, y in zip(xs, ys, strict=True)
    )


def copy_of(state: State) -> State:
    leaves, spec = flatten(state)
    return unflatten(spec, [x.clone() for x in leaves])


# -- a step that nobody objects to ---------------------------------------------------------------


@one_in(2)
@given(trainings(max_ranks=6))
def test_a_vote_that_passes_changes_no_bit(case: Training) -> None:
    plain, voted = train(case), train(replace(case, commit=Vote()))
    for a, b in zip(plain, voted, strict=True):
        assert same((a.params, a.state), (b.params, b.state))
        for before, after in zip(a.metrics, b.metrics, strict=True):
            assert bool(after.pop("committed")) and not after.pop("veto").any()
            assert same(before, after)


# -- a step that somebody objects to -------------------------------------------------------------


class Seen(NamedTuple):
    """A step on a rank: the state before and after, and the metrics."""

    before: State
    after: State
    metrics: dict[str, Tensor]


def arena(comm: Comm, place: Place, donate: bool, steps: int) -> list[Seen]:
    run = Arena(comm, POSITION, place, donate)
    seen: list[Seen] = []
    for number in range(steps):
        before = copy_of(run.state)
        if run.place and (comm.rank, number) == (place.rank, place.step):
            before = copy_of(place.fault.state(run.state))
        metrics = run.take(number)
        seen.append(Seen(before, copy_of(run.state), metrics))
    return seen


def is_vetoed_on_all(place: Place, donate: bool = False) -> None:
    """The law: all ranks decide alike, name who it was and why, and keep the state they had."""
    ranks = simulate(arena, MESH, *[[x] * MESH.size for x in (place, donate, place.step + 1)])
    verdicts = {tuple(seen[-1].metrics["veto"].tolist()) for seen in ranks}
    assert len(verdicts) == 1, f"{place.fault.name}: ranks have counted {verdicts}"
    (veto,) = verdicts
    named = [rank for rank, reasons in enumerate(veto) if reasons & place.fault.reason]
    assert named == [place.rank], f"{place.fault.name} on rank {place.rank}: vetoed are {veto}"
    for seen in ranks:
        for earlier in seen[:-1]:
            assert bool(earlier.metrics["committed"])
            assert not same(earlier.before.params, earlier.after.params)
        before, after, metrics = seen[-1]
        assert not bool(metrics["committed"])
        assert same(after, before._replace(step=before.step + 1))
    text = why_vetoed(ranks[0][-1].metrics)
    assert f"rank {place.rank}: " in text and WHY[place.fault.reason] in text


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_is_vetoed_wherever_it_strikes(fault: Fault) -> None:
    for rank in MESH:
        is_vetoed_on_all(Place(fault, rank, step=rank % 2), donate=rank == 3)


@one_in(4)
@given(
    fault=st.sampled_from(FAULTS),
    rank=st.integers(0, 3),
    step=st.integers(0, 2),
    donate=st.booleans(),
)
def test_in_any_step_on_any_rank(fault: Fault, rank: int, step: int, donate: bool) -> None:
    is_vetoed_on_all(Place(fault, rank, step), donate)


def real(comm: Comm, place: Place) -> tuple[list[int], str]:
    seen = arena(comm, place, False, 1)[0]
    assert same(seen.after, seen.before._replace(step=seen.before.step + 1))
    return seen.metrics["veto"].tolist(), why_vetoed(seen.metrics)


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name != "fibers are crossed"])
def test_real_ranks_decide_alike(fault: Fault, ranks2: Farm) -> None:
    """Fault by its number: functions of a fault do not travel."""
    number = FAULTS.index(fault)
    one, other = ranks2.run(real_by_number, Mesh(edp=1, ep=2), [number] * 2)
    assert one == other and one[0][1] & fault.reason


def real_by_number(comm: Comm, number: int) -> tuple[list[int], str]:
    return real(comm, Place(FAULTS[number], 1, 0))


# -- what becomes of a veto ----------------------------------------------------------------------


@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_is_taken_again_is_as_if_nothing_had_been(donate: bool) -> None:
    transient = [f for f in FAULTS if f.name in ("a loss is not a number", "a gradient drifts")]

    def program(comm: Comm, place: Place | None) -> tuple[State, str]:
        run, said = Arena(comm, Vote("raise"), place, donate), ""
        for number in range(3):
            try:
                run.take(number)
            except Vetoed as error:
                said = str(error)
                run.place = None
                assert bool(error.metrics["veto"].any())
                run.number = -1  # the fault is over
                run.state, _ = run.step(run.state, make_batch(comm.rank, number))
        return run.state, said

    quiet = simulate(program, MESH, [None] * MESH.size)
    for fault in transient:
        struck = simulate(program, MESH, [Place(fault, 2, 1)] * MESH.size)
        assert len({said for _, said in struck}) == 1
        assert f"rank 2: {WHY[fault.reason]}" in struck[0][1]
        for (state, _), (expected, _) in zip(struck, quiet, strict=True):
            assert same(state, expected)


def test_a_few_in_a_row_are_borne() -> None:
    taken = {"committed": torch.tensor(True), "veto": torch.tensor([0, 0])}
    vetoed = {"committed": torch.tensor(False), "veto": torch.tensor([0, 4])}
    vetoes = 0
    for metrics in (vetoed, vetoed, taken, vetoed, vetoed):
        vetoes = vetoes_in_a_row(metrics, vetoes, most=2)
    assert vetoes == 2
    with pytest.raises(Vetoed, match="rank 1: it started other collectives") as raised:
        vetoes_in_a_row(vetoed, vetoes, most=2)
    assert raised.value.__notes__ == ["3 steps in a row were not taken, more than most=2"]


def test_copies_that_have_parted_stay_vetoed() -> None:
    drift = next(f for f in FAULTS if f.name == "a parameter drifts")
    for seen in simulate(arena, MESH, [Place(drift, 1, 1)] * 4, [False] * 4, [4] * 4):
        assert [bool(step.metrics["committed"]) for step in seen] == [True, False, False, False]
        assert int(seen[-1].after.step) == 4


def test_bad_arguments_and_transforms_are_refused() -> None:
    def program(comm: Comm) -> None:
        run = Arena(comm, Vote(), None, False)
        with pytest.raises(ValueError, match="commit under a transform"):
            torch.func.grad(lambda x: run.step(run.state, {"x": x})[1]["loss"])(torch.ones(1, 5))
        wrong: Any = "yes"
        with pytest.raises(ValueError, match=r"commit='yes': 'vote', a Vote, or None"):
            make_train_step(lambda s, b: (b, 1), run.plan, OPTIMIZER, comm, commit=wrong)

    simulate(program, MESH)
    wrong: Any = "ignore"
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        Vote(wrong)


# -- planted: votes that would not do -------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def deaf_to_the_last_rank(patch: pytest.MonkeyPatch) -> None:
    right = poll.Poll.count

    def count(self: poll.Poll, table: Tensor) -> Tensor:
        return right(self, torch.cat([table[:-1], table[:1]]))

    patch.setattr(poll.Poll, "count", count)


def decided_locally(patch: pytest.MonkeyPatch) -> None:
    """Every rank counts its own row only, and takes it for that of all."""
    right = poll.sum_over_ranks

    def sums(xs: list[Tensor], comm: Comm) -> list[Tensor]:
        return [right(xs, comm)[0], xs[1][comm.rank].expand_as(xs[1])]

    patch.setattr(poll, "sum_over_ranks", sums)


def without(column: Reason) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        init = poll.Poll.__init__

        def deaf(self: poll.Poll, *args: Any) -> None:
            init(self, *args)
            self.columns = [
                c._replace(groups=c.groups[:0]) if c.reason == column else c for c in self.columns
            ]

        patch.setattr(poll.Poll, "__init__", deaf)

    return plant


def without_moments(patch: pytest.MonkeyPatch) -> None:
    right = poll.Poll._held

    def held(self: poll.Poll, state: State, *rest: Any) -> Any:
        nothing = {label: {} for label in state.opt}
        return right(self, state._replace(opt=nothing), *rest)

    patch.setattr(poll.Poll, "_held", held)


def steps_on_a_veto(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        poll.Poll, "count", lambda self, table: torch.zeros(len(table), dtype=torch.int64)
    )


WRONG_VOTES: list[Plant] = [
    deaf_to_the_last_rank,
    decided_locally,
    without(Reason.ORDER),
    without(Reason.COPIES),
    without(Reason.STEP),
    without(Reason.POSITION),
    without_moments,
    steps_on_a_veto,
]


@pytest.mark.parametrize("plant", WRONG_VOTES)
def test_a_wrong_vote_is_found_out(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        for fault in FAULTS:
            is_vetoed_on_all(Place(fault, 3, 0))


# -- the digest ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 70), min_size=1, max_size=4), st.data(), seeds())
def test_a_flipped_bit_or_two_exchanged_numbers_change_the_digest(
    sizes: list[int], data: st.DataObject, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    dtypes = data.draw(st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
    xs = [torch.randn(n, generator=random).to(d) for n, d in zip(sizes, dtypes, strict=False)]
    large = data.draw(st.booleans())
    if large:
        xs.append(torch.randn(bits.LARGE // 4 + 3, generator=random)[1:])
    before = bits.digest(xs)
    assert bool(bits.digest([x.clone() for x in xs]) == before)
    filled = [i for i, x in enumerate(xs) if x.numel()]
    if not filled:
        return
    i = data.draw(st.sampled_from(filled))
    flat = xs[i].clone().view(torch.uint8)
    at = data.draw(st.integers(0, flat.numel() - 1))
    flat[at] ^= 1 << data.draw(st.integers(0, 7))
    assert bool(bits.digest([*xs[:i], flat.view(xs[i].dtype), *xs[i + 1 :]]) != before)
    rolled = xs[i].roll(1)
    if not torch.equal(rolled, xs[i]):
        assert bool(bits.digest([*xs[:i], rolled, *xs[i + 1 :]]) != before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [6, 1000, bits.ROW // 4, 3 * bits.LARGE])
def test_an_even_number_of_signs_changes_the_digest(size: int, dtype: torch.dtype) -> None:
    """What a sum of words forgets: the highest bit of each, added up, is nothing."""
    signs = {
        tuple(range(start, size, step)): start for step in (1, 2, 4, 8) for start in range(step)
    }
    for seed in range(5):
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
        found = [int(bits.digest([values])) for values in (x, torch.zeros_like(x))]
        for negative in signs:
            for values in (x, torch.zeros_like(x)):
                negated = values.clone()
                negated[list(negative)] *= -1
                found.append(int(bits.digest([negated])))
        assert len(set(found)) == 2 * len(signs) + 2 * (() not in signs)


@given(st.integers(0, 63), st.data(), seeds())
def test_the_same_bit_flipped_in_two_words_changes_the_digest(
    bit: int, data: st.DataObject, seed: int
) -> None:
    words = data.draw(st.sampled_from([2, 512, bits.ROW // 8, bits.LARGE]))
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**63), 2**63 - 1, (words,), generator=random)
    a = data.draw(st.integers(0, words - 1))
    b = data.draw(st.integers(0, words - 1).filter(lambda b: b != a))
    y = x.clone()
    y[[a, b]] ^= -(2**63) if bit == 63 else 1 << bit
    assert bool(bits.digest([x]) != bits.digest([y]))


def test_rounding_that_cancels_changes_the_digest() -> None:
    x = torch.ones(8, dtype=torch.float64)
    up, down = flip(x, 0)[:1], (x[:1].view(torch.int64) - 1).view(torch.float64)
    assert bool(bits.digest([torch.cat([up, down, x[2:]])]) != bits.digest([x]))


@pytest.mark.parametrize("read", [why_vetoed, vetoes_in_a_row])
def test_metrics_without_a_vote_say_nothing_of_one(read: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"of a step without a vote, they have \['loss'\]"):
        read({"loss": torch.zeros(())})


def test_what_the_compiler_generates_has_no_line() -> None:
    """Where ranks are compiled and one is not, all start the same collectives."""
    sent = [torch.ones(1)]

    def program(comm: Comm) -> tuple[dict[Axes, int], ...]:
        found: list[dict[Axes, int]] = []
        generated = eval("lambda: call()", {"call": lambda: None})
        generated.__globals__["call"] = partial(comm.all_reduce, sent, ("ep",))
        other = eval("lambda: call()", {"__name__": "mine", **generated.__globals__})
        for call in (generated.__globals__["call"], generated, other):
            order = Order(comm.mesh)
            with comm.heard_by(order):
                call()
            found.append(order.digests())
        return tuple(found)

    plain, generated, other = simulate(program, Mesh(ep=2))[0]
    assert plain == generated != other


def test_names_have_to_agree_within_a_fiber_only() -> None:
    """Ranks of another ep gather the same experts in another order, among themselves."""

    def program(comm: Comm, names: str) -> dict[Axes, int]:
        order = Order(comm.mesh)
        with comm.heard_by(order):
            for name in names:
                comm.start(Op("all_gather", ("edp",), of=name), [torch.ones(1)]).wait()
        return order.digests()

    a, b, c, d = simulate(program, Mesh(edp=2, ep=2), ["ab", "ba", "ab", "ba"])
    assert a == c and b == d
    assert {axes for axes in a if a[axes] != b[axes]} == {("edp",)}
