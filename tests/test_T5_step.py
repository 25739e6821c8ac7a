"""T5: ``P(update(g, s, p)) = update(P g, P s, P p)``, to the bit: optimizers are elementwise."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functional_ep.optim import Optimizer
from functional_ep.testing import Chosen, chosen

Pieces = list[Tensor]


def inputs(size: int, seed: int, moments: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(size, generator=stream, dtype=dtype) for name in ("p", "g", "m")}
    drawn["v"] = torch.rand(size, generator=stream, dtype=dtype)
    return {name: drawn[name] for name in ("p", "g", *moments)}


def updated(
    optimizer: Optimizer,
    step: int,
    pieces: dict[str, Pieces],
    donate: bool,
    factor: Tensor | None = None,
) -> dict[str, Tensor]:
    """The new parameters and moments, all pieces joined."""
    own = {name: [x.clone() for x in xs] for name, xs in pieces.items()}
    moments = {name: own[name] for name in own if name not in ("p", "g")}
    params, after = optimizer.update(
        torch.tensor(step), own["p"], own["g"], moments, donate, factor
    )
    return {name: torch.cat(xs) for name, xs in ({"p": params} | after).items()}


@given(
    chosen(),
    st.integers(1, 80),
    st.lists(st.integers(0, 80), max_size=3),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.sampled_from([None, torch.tensor(0.37, dtype=torch.float64)]),
    st.integers(0, 2**20),
)
def test_update_commutes_with_cutting(
    choice: Chosen,
    size: int,
    cuts: list[int],
    step: int,
    dtype: torch.dtype,
    donate: bool,
    factor: Tensor | None,
    seed: int,
) -> None:
    optimizer = choice.make()
    names = list(optimizer.init({"x": torch.zeros(1)}))
    whole = inputs(size, seed, names, dtype)
    places = sorted(min(cut, size) for cut in cuts)
    pieces = {name: list(x.tensor_split(places)) for name, x in whole.items()}
    at_once = updated(optimizer, step, {name: [x] for name, x in whole.items()}, False, factor)
    in_pieces = updated(optimizer, step, pieces, donate, factor)
    for name, x in at_once.items():
        assert torch.equal(in_pieces[name], x), f"{choice.name}: {name}, cut at {places} of {size}"


@given(chosen(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**20))
def test_a_factor_scales_the_gradient(choice: Chosen, dtype: torch.dtype, seed: int) -> None:
    optimizer, factor = choice.make(), torch.tensor(0.37, dtype=torch.float64)
    whole = inputs(40, seed, list(optimizer.init({"x": torch.zeros(1)})), dtype)
    given = {name: [x] for name, x in whole.items()}
    scaled = given | {"g": [whole["g"] * factor.to(dtype)]}
    found, right = updated(optimizer, 3, given, True, factor), updated(optimizer, 3, scaled, True)
    eps = torch.finfo(dtype).eps
    for name, x in right.items():
        torch.testing.assert_close(found[name], x, rtol=16 * eps, atol=16 * eps)
    unscaled = updated(optimizer, 3, given, True)
    assert any(not torch.equal(unscaled[name], x) for name, x in right.items())
