"""T2: gradient, norm, loss and state after n steps are the same for every mesh."""

from __future__ import annotations

import reference
from closeness import assert_close, assert_leaves_close
from hypothesis import given
from hypothesis import strategies as st

from functional_ep.testing import Training, train, trainings
from sharding import Mesh


@st.composite
def two_meshes(draw: st.DrawFn) -> tuple[Training, Mesh]:
    """A training, and another mesh of at least as many ranks whose ep divides its experts."""
    case = draw(trainings())
    eps = [ep for ep in range(1, 9) if case.cfg.experts % ep == 0]
    ep = draw(st.sampled_from(eps))
    least = -(-case.mesh.size // ep)
    edp = draw(st.integers(least, max(least, 8 // ep)))
    sizes = draw(st.permutations([("edp", edp), ("ep", ep)]))
    return case, Mesh(**dict(sizes))


@given(two_meshes())
def test_every_mesh_trains_alike(drawn: tuple[Training, Mesh]) -> None:
    case, other = drawn
    one, two = train(case)[0], train(case.on(other))
    for rank, there in enumerate(two):
        for step, (m, n) in enumerate(zip(one.metrics, there.metrics, strict=True)):
            assert sorted(m) == sorted(n)
            for name, x in m.items():
                assert_close(n[name], x, f"{name} of step {step} on rank {rank}")
        for step, (p, q) in enumerate(zip(one.params, there.params, strict=True)):
            expected, found = reference.named(p), reference.named(q)
            assert_leaves_close(found, expected, f"params after step {step}")
