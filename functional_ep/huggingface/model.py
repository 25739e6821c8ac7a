"""Model: what a transformers model is to a plan, and the functions that compute with shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from functional_ep.huggingface.adapted import load_with_adapter, with_adapter
from functional_ep.huggingface.detect import check_supported, find_routed
from functional_ep.huggingface.experts import Kind
from functional_ep.huggingface.load import load, load_buffers
from functional_ep.huggingface.objective import Loss, Objective, RouterLoss, balance_of
from functional_ep.huggingface.replica import Replica
from functional_ep.huggingface.skeleton import read_config, skeleton_from, skeleton_of, true_buffers
from functional_ep.huggingface.stacks import stack_experts
from sharding import Comm, Plan
from sharding.walk import Backward

Source = PreTrainedModel | PreTrainedConfig | Path
Weights = str | Path | Mapping[str, Tensor] | nn.Module


@dataclass(frozen=True)
class Model:
    """A transformers model as a plan sees it: names, shapes and labels, and functions of shards.

    Everything is keyed by the names that ``named_parameters()`` gives, so that a label pattern
    reads ``label_by_path({"*.mlp.experts.*": "expert"}, default="dense")``; a tied weight is one
    leaf. What the model's class itself excludes from training is a buffer. Made by
    :func:`functional_ep.from_huggingface`.
    """

    skeleton: PreTrainedModel
    initial: Mapping[str, Tensor]
    routed: Mapping[str, Kind]
    source: Source
    base: PreTrainedModel | None = None  # the skeleton, if it was given an adapter afterwards

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """``{name: tensor}``: the model's constants, those that a directory holds read from it."""
        return self._read_buffers

    @cached_property
    def _read_buffers(self) -> dict[str, Tensor]:
        if not isinstance(self.source, Path):
            return dict(self.initial)
        return {**self.initial, **load_buffers(self.base or self.skeleton, self.source)}

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """``{name: meta tensor}``: shape and dtype of every parameter."""
        return {name: p.detach() for name, p in self.skeleton.named_parameters()}

    @cached_property
    def labels(self) -> dict[str, str]:
        """``{name: label}``: ``"expert"`` of what is stacked by routed expert, ``"dense"`` else."""
        stacked = {
            f"{path}.{name}"
            for path, kind in self.routed.items()
            for name in kind.stacked(self.skeleton.get_submodule(path))
        }
        return {name: "expert" if name in stacked else "dense" for name in self.shapes}

    @cached_property
    def experts(self) -> dict[str, int]:
        """``{path: E}`` of every module of routed experts; ranks that split them divide E."""
        return {
            path: kind.experts(self.skeleton.get_submodule(path))
            for path, kind in self.routed.items()
        }

    def load(self, plan: Plan, comm: Comm, weights: Weights | None = None) -> dict[str, Tensor]:
        """This rank's shards, in the shape of ``shapes``; nothing is sent between ranks.

        Args:
            plan: made from ``shapes``.
            comm: says which rank this is.
            weights: a directory, a state dict or a module; by default what the model was made from.

        Raises:
            ValueError: there are no weights to load: the source is a config, or on meta.
        """
        self._check_plan(plan, comm)
        source = self.source if weights is None else weights
        if isinstance(source, PreTrainedConfig):
            raise ValueError(
                "a config has no weights: from_huggingface takes a model or a directory that has "
                "some, and load(plan, comm, weights=...) a state dict as well"
            )
        if isinstance(source, nn.Module):
            _refuse_meta(source)
        if self.base is not None:
            return load_with_adapter(self.base, source, plan, comm)
        return load(self.skeleton, source, plan, comm)

    def apply(
        self,
        plan: Plan,
        comm: Comm,
        backward: Backward = "regather",
        training: bool = False,
        compile: bool = False,
    ) -> Callable[..., Any]:
        """``f(shards, **inputs)``: the model's own output object, from this rank's shards.

        Args:
            plan: made from ``shapes``.
            comm: the ranks; all call together, each with its own inputs.
            backward: see :func:`sharding.sharded`; the units are the layers, and the modules that
                lie outside of them.
            training: whether dropout drops.
            compile: whether layers are compiled, all but their routed experts, see
                :func:`functional_ep.compiled`; the same numbers, up to rounding.
        """
        self._check_plan(plan, comm)
        how = plan, comm, backward, training, compile
        return Replica(self.skeleton, self.buffers, self.routed, *how)

    def loss(
        self,
        plan: Plan,
        comm: Comm,
        backward: Backward = "regather",
        training: bool = True,
        router_loss: RouterLoss = "global",
        compile: bool = False,
    ) -> Loss:
        """``loss(shards, batch) -> (sum, count, aux)``: cross-entropy and the model's router loss.

        The batch is ``dict(input_ids, labels, attention_mask)`` as for ``lm.loss``:
        ``labels[b, s]`` is the token that follows position s, or -100 for none. (transformers
        shifts inside; :func:`functional_ep.huggingface.next_tokens` makes these labels
        of those.) Whatever else the batch holds goes to the model. Its load-balancing loss is
        added with its weight if its config asks for it (``output_router_logits``).

        Args:
            plan: made from ``shapes``.
            comm: the ranks.
            backward: see :func:`sharding.sharded`.
            training: whether dropout drops.
            router_loss: ``"global"``: on statistics of all ranks, the same on every mesh.
                ``"micro_batch"``: each rank's own, as transformers computes it.
            compile: see :meth:`apply`.
        """
        replica = self.apply(plan, comm, backward, training, compile)
        assert isinstance(replica, Replica)
        return Objective(replica, balance_of(replica.model), router_loss)

    def _check_plan(self, plan: Plan, comm: Comm) -> None:
        plan.check_mesh(comm)
        found = set(plan.tree) if isinstance(plan.tree, dict) else set[str]()
        if found != set(self.shapes):
            some = sorted(found ^ set(self.shapes))[:3]
            raise ValueError(
                f"the plan was made for other params: they differ in {some}. "
                "Make it with make_plan(model.shapes, model.labels, rules, mesh)"
            )
        labels = self.labels
        plan.check_whole(lambda name: labels[name] == "expert")


def model_of(source: Any, dtype: torch.dtype | None = None, adapter: Any = None) -> Model:
    """See :func:`functional_ep.from_huggingface`."""
    if hasattr(source, "get_base_model"):  # of peft, whose adapters are modules of the model
        source = source.get_base_model()
    if isinstance(source, str | Path):
        source = Path(source)
        skeleton = skeleton_from(read_config(source), dtype)
    elif isinstance(source, PreTrainedConfig):
        skeleton = skeleton_from(source, dtype)
    elif isinstance(source, PreTrainedModel):
        skeleton = skeleton_of(source)
        if dtype is not None:
            nn.Module.to(skeleton, dtype)
    else:
        kind = type(source).__name__
        hint = "; a plain torch module has no config" if isinstance(source, nn.Module) else ""
        raise TypeError(
            f"from_huggingface takes a transformers model, its config, or a directory, "
            f"not a {kind}{hint}"
        )
    buffers = true_buffers(skeleton)
    stack_experts(skeleton)
    base = None if adapter is None else skeleton
    if base is not None:
        skeleton = with_adapter(base, adapter)
    check_supported(skeleton)
    return Model(skeleton, buffers, find_routed(skeleton), source, base)


def _refuse_meta(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(
                f"{name} is on the meta device: its model has no weights to load. Pass the "
                "directory that holds them"
            )
