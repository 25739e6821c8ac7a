"""Owner: a module whose parameters are views of a part, there only while they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from functional_ep.huggingface.parts import Part


class Owner(NamedTuple):
    """A module that owns parameters: it has a plain dict of views, or one that has them gathered.

    Reading a parameter, which layers do all the time, then costs what it costs in any module.
    """

    module: nn.Module
    places: tuple[tuple[str, int | None], ...]  # which view of the part; none: a bias that is None
    absent: _Absent

    @classmethod
    def of(
        cls, module: nn.Module, part: Part, leaves: Sequence[str], read: Callable[[], None]
    ) -> Owner:
        views = {s.attribute: leaves.index(s.leaf) for s in part.slots if s.module is module}
        places = tuple((name, views.get(name)) for name in module._parameters)
        owner = cls(module, places, _Absent(module, read))
        owner.unbind()
        return owner

    def values(self, views: Sequence[Tensor]) -> dict[str, Any]:
        """The module's parameters, made of the part's views."""
        return {name: None if i is None else views[i] for name, i in self.places}

    def bind(self, views: Sequence[Tensor]) -> None:
        self.module.__dict__["_parameters"] = self.values(views)

    def unbind(self) -> None:
        self.module.__dict__["_parameters"] = self.absent


class _Absent(dict[str, Any]):
    """A module's parameters while they are not there; reading one has its part gathered."""

    def __init__(self, module: nn.Module, read: Callable[[], None]) -> None:
        super().__init__(module._parameters)
        self.module, self.read = module, read

    def __getitem__(self, name: str) -> Any:
        self.read()
        now: Any = self.module._parameters
        return super().__getitem__(name) if now is self else now[name]


def stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """A parameter that takes no memory, and shows if it is computed with."""
    nothing = torch.full((), torch.nan, dtype=dtype, device=device)
    return nn.Parameter(nothing.expand(shape), requires_grad=False)
