"""Weights of a source as those of a module: transformers' own conversions, run on lazy tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.core_model_loading import dot_natural_key

from functional_ep.huggingface.lazy import Lazy
from functional_ep.huggingface.names import Module, Names, match
from functional_ep.huggingface.source import Given

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHOWN = 10  # names in one message


class Target(NamedTuple):
    """A tensor of the module, and what it is made of."""

    value: Lazy
    made_of: list[Given]

    def __str__(self) -> str:
        return _describe(self.made_of)


def assemble(module: Module, given: Mapping[str, Given], hub: bool = True) -> dict[str, Target]:
    """Every parameter and persistent buffer of the module as a lazy tensor of those of a source.

    A parameter with several names has those that the source has.

    Raises:
        ValueError: tensors missing, not expected, of another shape, or of a dtype that is none of
            a weight; each by its name and place.
    """
    _refuse_quantised(module)
    names = match(module, given, hub)
    _check_names(module, names, given)
    targets = {
        target: Target(_lazy(given[name], target, module), [given[name]])
        for target, name in names.renamed.items()
    }
    for target, (converter, parts) in names.converted.items():
        targets |= _convert(target, converter, [(p, given[name]) for p, name in parts], module)
    _check_complete(module, targets, given)
    for name, target in targets.items():
        _check_shape(module, name, target)
    return targets


def _lazy(one: Given, target: str, module: Module) -> Lazy:
    is_buffer = target not in module.first_name
    if one.dtype is None or (one.dtype not in FLOATS and not is_buffer):
        raise ValueError(
            f"{one} is {one.dtype or 'of a dtype unknown to torch'}, in which {target} cannot be "
            "trained. Dequantise quantised weights once, with transformers' "
            "from_pretrained(path, dtype=...) and save_pretrained(other_path)"
        )
    return Lazy.stored(one.shape, one.dtype, one.fill)


def _convert(
    target: str, converter: Any, parts: list[tuple[str, Given]], module: Module
) -> dict[str, Target]:
    made_of = [one for _, one in parts]
    by_pattern: dict[str, list[Given]] = {}
    for pattern, one in parts:
        by_pattern.setdefault(pattern, []).append(one)
        converter.add_tensor(target, one.name, pattern, _lazy(one, target, module))
    for ones in by_pattern.values():
        _check_numbers(target, ones)
    skeleton, absent = module.skeleton, set(converter.source_patterns) - set(by_pattern)
    try:
        results = converter.convert(target, model=skeleton, config=skeleton.config)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        for ones in by_pattern.values():
            _check_shapes(target, ones)
        made = _describe(made_of)
        why = f" alone: there is no {_some(sorted(absent))}" if absent else f": {error}"
        raise ValueError(f"{target} cannot be made of {made}{why}") from error
    return {
        name: Target(value[0] if isinstance(value, list) else value, made_of)
        for name, value in results.items()
    }


def _check_shapes(target: str, ones: list[Given]) -> None:
    """What cannot be stacked, since it has not the shape of the others."""
    usual = Counter(one.shape for one in ones).most_common(1)[0][0]
    for one in ones:
        if one.shape != usual:
            raise ValueError(f"{one}, but the others that make {target} have the shape {usual}")


def _check_numbers(target: str, ones: list[Given]) -> None:
    """What is stacked has the numbers 0, 1, 2, ... in its names."""
    parts = list(zip(*(one.name.split(".") for one in ones), strict=False))
    numbers = next((part for part in parts if len(set(part)) == len(part) > 1), ())
    for i, number in enumerate(numbers):
        word = number.rstrip("0123456789")
        if number != word and int(number.removeprefix(word)) != i:
            lost = ".".join(f"{word}{i}" if part is numbers else part[i] for part in parts)
            raise ValueError(f"{lost} is missing from {ones[i].where}; {target} is made of it")


def _refuse_quantised(module: Module) -> None:
    quantised = getattr(module.skeleton.config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"the weights of {module} are quantised, says its config ({method}), and cannot be "
            "trained as they are. Dequantise them once: from_pretrained(path, quantization_config="
            "...) with the dequantize=True of its method, then save_pretrained(other_path)"
        )


def _check_names(module: Module, names: Names, given: Mapping[str, Given]) -> None:
    """Nothing is left over, but what transformers leaves out of this model."""
    unknown = _heeded(module, set(), set(names.unexpected))[1]
    if unknown:
        ordered = sorted((names.unexpected[name] for name in unknown), key=dot_natural_key)
        raise ValueError(
            f"{module} has no {_some(ordered)}, found in {given[ordered[0]].where}: the weights "
            "are of another model, or of more than this one. Save them once as this class, with "
            "transformers' from_pretrained(path) and save_pretrained(other_path)"
        )


def _check_complete(
    module: Module, targets: Mapping[str, Target], given: Mapping[str, Given]
) -> None:
    """Every parameter is there; a buffer may be missing where transformers says so."""
    there = {module.first_name.get(name, name) for name in targets}
    missing = {name for name in module.first_name.values() if name not in there}
    buffers = {name for name in module.buffers if name not in there}
    missing |= _heeded(module, buffers, set())[0]
    if missing:
        where = next((one.where for one in given.values()), "an empty source")
        raise ValueError(
            f"{_some(sorted(missing, key=dot_natural_key))} of {module} cannot be found, as in "
            f"{where}: the weights are incomplete, or of another model"
        )


def _check_shape(module: Module, name: str, target: Target) -> None:
    made = f"{target} makes {name} {tuple(target.value.shape)}"
    why = "weights and config are not of one model"
    if name not in module.expected:
        raise ValueError(f"{made}, which {module} does not have: {why}")
    shape = tuple(module.expected[name].shape)
    if target.value.shape != shape:
        raise ValueError(f"{made}, but the model's has the shape {shape}: {why}")


def _heeded(module: Module, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Without the names that the class tells transformers to ignore."""
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    module.skeleton._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys


def _describe(made_of: list[Given]) -> str:
    more = f" and {len(made_of) - 1} others" if len(made_of) > 1 else ""
    return f"{made_of[0]}{more}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
