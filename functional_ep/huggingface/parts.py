"""Parts: a module tree cut into pieces that are gathered one after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class Slot(NamedTuple):
    """Where a leaf is read: an attribute of one module. A tied leaf has several slots."""

    module: nn.Module
    attribute: str
    leaf: str


class Part(NamedTuple):
    """A module whose parameters are gathered when it is called, or when one of them is read."""

    path: str
    module: nn.Module
    slots: tuple[Slot, ...]

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves that the part computes with, each once."""
        return tuple(dict.fromkeys(slot.leaf for slot in self.slots))

    @property
    def is_layer(self) -> bool:
        """Whether several modules compute with them, one after the other."""
        return len({id(slot.module) for slot in self.slots}) > 1


def parts(model: nn.Module) -> list[Part]:
    """Every element of a list of layers; outside of them every module that contains no such list.

    What a module that contains lists owns itself is a part as well, gathered when it is read.

    >>> layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    >>> model = nn.ModuleDict({"embed": nn.Embedding(2, 1), "layers": layers, "head": layers[0]})
    >>> [(part.path, part.leaves) for part in parts(model)][:2]
    [('embed', ('embed.weight',)), ('layers.0', ('layers.0.weight', 'layers.0.bias'))]
    """
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    found: list[Part] = []
    for path, module, whole in _pieces(model, ""):
        inner = module.modules() if whole else [module]
        owners = [m for m in inner if id(m) not in seen]
        slots = tuple(
            Slot(m, attribute, names[id(p)])
            for m in owners
            for attribute, p in m._parameters.items()
            if p is not None
        )
        seen.update(map(id, owners))
        if slots:
            found.append(Part(path, module, slots))
    return found


def _pieces(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Modules in order, and whether everything below belongs to them."""
    inner = [m for m in module.modules() if m is not module]
    if not any(isinstance(m, nn.ModuleList) and any(True for _ in m.parameters()) for m in inner):
        yield path, module, True
        return
    yield path, module, False
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield from ((f"{below}.{i}", element, True) for i, element in enumerate(child))
        else:
            yield from _pieces(child, below)
