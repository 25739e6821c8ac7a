"""Experts that are modules of their own, as one module with stacked parameters, and back in files.

A skeleton holds no numbers, so its experts can be exchanged for a stack before anything is loaded:
what was ``experts.expert_3.wi.weight`` is row 3 of ``experts.wi.weight``, to plans and to shards.
Sources and directories keep the names that transformers knows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import MergeModulelist, WeightConverter

PREFIX = {"SwitchTransformersExperts": "expert_"}  # of the names of experts, by their container


class Stack(nn.Module):
    """The modules that an expert consists of, each parameter with one entry per expert."""

    def __init__(self, apart: nn.ModuleDict) -> None:
        super().__init__()
        one, *_ = apart.values()
        self.prefix, self.num_experts = PREFIX[type(apart).__name__], len(apart)
        for name, child in copy.deepcopy(one).named_children():
            self.add_module(name, child)
        self.names = [name for name, _ in self.named_parameters()]
        for name in self.names:
            path, _, attribute = name.rpartition(".")
            p = one.get_parameter(name)
            stacked = torch.empty((len(apart), *p.shape), dtype=p.dtype, device="meta")
            owner = self.get_submodule(path)
            owner.register_parameter(attribute, nn.Parameter(stacked, requires_grad=False))


def are_apart(module: nn.Module) -> bool:
    """Whether a module contains experts that are modules of their own."""
    return type(module).__name__ in PREFIX


def stacked_names(stack: Any) -> list[str]:
    """Its parameters, all of which have one entry per expert."""
    return stack.names


def count_modules(stack: Any) -> int:
    """How many experts it was made of."""
    return stack.num_experts


def stack_experts(skeleton: Any) -> None:
    """Exchange every container of separate experts for a stack, in place."""
    for path, module in list(skeleton.named_modules()):
        if are_apart(module):
            skeleton.set_submodule(path, Stack(module))


def conversions_of(skeleton: Any) -> list[WeightConverter]:
    """What makes the stacks of the tensors of files; transformers runs it backwards as well."""
    found: dict[str, WeightConverter] = {}
    for path, module in skeleton.named_modules():
        for name in module.names if isinstance(module, Stack) else ():
            end = path.rpartition(".")[2]
            source, target = f"{end}.{module.prefix}*.{name}", f"{end}.{name}"
            found[source] = WeightConverter([source], [target], [MergeModulelist(dim=0)])
    return list(found.values())
