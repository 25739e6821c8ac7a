"""Meshes: rank = row-major index of its coordinates, and fibers through it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharding import Mesh
from sharding.testing import axes_of, meshes


@given(st.data())
def test_ranks_are_the_entries_of_an_array_in_row_major_order(data: st.DataObject) -> None:
    mesh: Mesh = data.draw(meshes())
    axes = data.draw(axes_of(mesh))
    array = torch.arange(mesh.size).reshape([mesh[axis] for axis in mesh.axes])
    for rank, place in enumerate(product(*(range(mesh[axis]) for axis in mesh.axes))):
        coords = dict(zip(mesh.axes, place, strict=True))
        assert array[place] == rank == mesh.rank(coords) and mesh.coords(rank) == coords
        # The fiber: all entries along its axes, at this rank's coordinates of the others.
        rest = tuple(slice(None) if axis in axes else coords[axis] for axis in mesh.axes)
        kept = [axis for axis in mesh.axes if axis in axes]
        fiber = array[rest].permute([kept.index(axis) for axis in axes]).flatten().tolist()
        assert mesh.fiber(rank, axes) == tuple(fiber)
        assert mesh.fiber(rank, axes)[mesh.index(rank, axes)] == rank
        assert len(fiber) == mesh.count(axes)


@given(st.data())
def test_every_rank_of_a_fiber_sees_the_same_fiber(data: st.DataObject) -> None:
    mesh: Mesh = data.draw(meshes())
    axes = data.draw(axes_of(mesh))
    for rank in mesh:
        assert {mesh.fiber(peer, axes) for peer in mesh.fiber(rank, axes)} == {
            mesh.fiber(rank, axes)
        }
    assert set(axes) | set(mesh.rest(axes)) == set(mesh.axes)
    assert mesh.count(axes) * mesh.count(mesh.rest(axes)) == mesh.size


def test_the_last_axis_varies_fastest() -> None:
    mesh = Mesh(edp=2, ep=3)
    assert [mesh.fiber(4, axes) for axes in [("ep",), ("edp",), ("edp", "ep"), ("ep", "edp")]] == [
        (3, 4, 5),
        (1, 4),
        (0, 1, 2, 3, 4, 5),
        (0, 3, 1, 4, 2, 5),
    ]
    assert list(mesh) == [0, 1, 2, 3, 4, 5] and repr(mesh) == "Mesh(edp=2, ep=3)"
    assert Mesh().size == 1 and Mesh().coords(0) == {} and Mesh().fiber(0, ()) == (0,)
    assert mesh == Mesh(edp=2, ep=3) != Mesh(ep=3, edp=2)
    assert len({mesh, Mesh(edp=2, ep=3), Mesh(ep=3, edp=2)}) == 2


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2", None])
def test_an_axis_has_a_positive_number_of_ranks(size: Any) -> None:
    with pytest.raises(ValueError, match=r"Mesh\(ep=.*\): an axis has a positive number of ranks"):
        Mesh(ep=size)


@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_that_is_not_there_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"rank -?\d is not on Mesh\(edp=2, ep=3\).* 0 to 5"):
        Mesh(edp=2, ep=3).coords(rank)


@pytest.mark.parametrize("coords", [{"edp": 2, "ep": 0}, {"edp": 0, "ep": -1}, {"ep": 0}, {}])
def test_so_are_coordinates(coords: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"is not on Mesh\(edp=2, ep=3\)"):
        Mesh(edp=2, ep=3).rank(coords)


def test_a_mesh_without_axes_says_how_one_process_has_them() -> None:
    with pytest.raises(
        ValueError, match=r"axis 'ep' is not on Mesh\(\): one process is Mesh\(ep=1\)"
    ):
        Mesh().check(("ep",))
