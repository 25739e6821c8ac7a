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
    optimizer: Optimizer, step: int, pieces: dict[str, Pieces], donate: bool
) -> dict[str, Tensor]:
    """The new parameters and moments, all pieces joined."""
    own = {name: [x.clone() for x in xs] for name, xs in pieces.items()}
    moments = {name: own[name] for name in own if name not in ("p", "g")}
    params, after = optimizer.update(torch.tensor(step), own["p"], own["g"], moments, donate)
    return {name: torch.cat(xs) for name, xs in ({"p": params} | after).items()}


@given(
    chosen(),
    st.integers(1, 80),
    st.lists(st.integers(0, 80), max_size=3),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_update_commutes_with_cutting(
    choice: Chosen,
    size: int,
    cuts: list[int],
    step: int,
    dtype: torch.dtype,
    donate: bool,
    seed: int,
) -> None:
    optimizer = choice.make()
    names = list(optimizer.init({"x": torch.zeros(1)}))
    whole = inputs(size, seed, names, dtype)
    places = sorted(min(cut, size) for cut in cuts)
    pieces = {name: list(x.tensor_split(places)) for name, x in whole.items()}
    at_once = updated(optimizer, step, {name: [x] for name, x in whole.items()}, False)
    in_pieces = updated(optimizer, step, pieces, donate)
    for name, x in at_once.items():
        assert torch.equal(in_pieces[name], x), f"{choice.name}: {name}, cut at {places} of {size}"
