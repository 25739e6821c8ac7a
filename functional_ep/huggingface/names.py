"""Names of files and of modules: which of the one become which of the other, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from functional_ep.huggingface.lazy import Lazy
from functional_ep.huggingface.stacks import conversions_of


class Module:
    """A transformers module on the meta device, as conversions see it: names and shapes."""

    def __init__(self, skeleton: Any) -> None:
        self.skeleton = skeleton

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """Every parameter, by all of its names, and every persistent buffer."""
        return self.skeleton.state_dict()

    @cached_property
    def first_name(self) -> dict[str, str]:
        """Every name of every parameter to the one in ``named_parameters()``: what is tied."""
        first: dict[int, str] = {}
        return {
            name: first.setdefault(id(parameter), name)
            for name, parameter in self.skeleton.named_parameters(remove_duplicate=False)
        }

    @cached_property
    def buffers(self) -> list[str]:
        """The persistent buffers."""
        return [name for name in self.expected if name not in self.first_name]

    def __str__(self) -> str:
        return type(self.skeleton).__name__


class Names(NamedTuple):
    """Which tensors of a source become which of the module, before anything is converted."""

    renamed: dict[str, str]
    converted: dict[str, tuple[Any, list[tuple[str, str]]]]
    unexpected: dict[str, str]
    used: list[Any]


def match(module: Module, names: Iterable[str], hub: bool = True) -> Names:
    """Follow transformers' table; with ``hub=False`` the names are the module's already.

    Raises:
        ValueError: two tensors that are the same one of the module.
    """
    table = get_model_conversion_mapping(module.skeleton) if hub else []
    table += conversions_of(module.skeleton)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    expected, prefix = module.expected, module.skeleton.base_model_prefix
    found = Names({}, {}, {}, [])
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:  # a pattern that was not meant for it
            target, pattern = name, None
        if target not in expected:
            found.unexpected[target] = name
        elif pattern is not None:
            fresh = (copy.deepcopy(by_pattern[pattern]), [])
            found.converted.setdefault(target, fresh)[1].append((pattern, name))
        elif target in found.renamed:
            both = f"{found.renamed[target]} and {name}"
            raise ValueError(f"{both} are both {target} of {module}: remove one of them")
        else:
            found.renamed[target] = name
    found.used.extend(entry for entry in table if entry.was_used())
    return found


def to_hub(module: Module, tensors: Mapping[str, Lazy], used: list[Any] | None) -> dict[str, Lazy]:
    """Names and shapes of the module to those of files: ``used`` conversions, backwards.

    With ``used=None`` those that transformers uses for a model that was not loaded.
    """
    private, own = copy.copy(module.skeleton), conversions_of(module.skeleton)
    if used is None and own:
        every = get_model_conversion_mapping(module.skeleton, add_legacy=False)
        used = [entry for entry in every if not isinstance(entry, PrefixChange)]
    if used is not None:
        known = {pattern for entry in used for pattern in entry.source_patterns}
        private._weight_conversions = used + [
            entry for entry in own if known.isdisjoint(entry.source_patterns)
        ]
    found: dict[str, Any] = revert_weight_conversion(private, dict[str, Tensor](tensors))
    return found
