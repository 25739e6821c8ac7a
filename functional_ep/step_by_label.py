"""From summed gradients to the next state: each label by its optimizer, all by one clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharding import Comm, Plan
from sharding.collectives import pvary
from sharding.tree import flatten, path_strings, show, unflatten

from .optim import Leaves, Optimizer, by_label
from .state import State

EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class StepByLabel:
    """``params, moments = update(params, factor * summed gradients, moments)`` for each label.

    The factor is one over the count of tokens, times what clips the norm.
    """

    def __init__(
        self,
        plan: Plan,
        optimizers: Optimizer | Mapping[str, Optimizer],
        comm: Comm,
        clip: float | None,
        donate: bool,
    ) -> None:
        self.plan, self.comm, self.clip, self.donate = plan, comm, clip, donate
        self.optimizers = by_label(optimizers, plan)
        self.single = isinstance(optimizers, Optimizer)
        self.trained = plan.trained_positions
        copies = plan.copies(comm)
        self.copies = [copies[i] for i in self.trained]
        labels = [leaf.label for leaf in plan.leaves]
        self.positions = {
            label: [i for i in self.trained if labels[i] == label] for label in plan.trained
        }
        self.factored = {
            i
            for label, positions in self.positions.items()
            if self.optimizers[label].factored
            for i in positions
            if plan.layouts[i].is_local
        }
        self.moments = {label: sorted(tx.init({})) for label, tx in self.optimizers.items()}
        self.paths = {
            label: [plan.leaves[i].path for i in positions]
            for label, positions in self.positions.items()
        }

    def check(self, state: State) -> None:
        """Refuse a state that other optimizers have begun."""
        found = {label: sorted(moments) for label, moments in state.opt.items()}
        if found != self.moments:
            raise ValueError(
                f"the state has the moments {found}, and these optimizers have {self.moments}: "
                "give those that it was begun with, or start with init_state(state.params, ...)"
            )
        if self.donate:
            _refuse_shared(state, self.trained)

    def __call__(
        self, state: State, shards: Leaves, grads: Leaves, per_token: Tensor, norm: Tensor
    ) -> State:
        factor = per_token
        if self.clip is not None:
            factor = factor * (self.clip / (norm + EPS)).clamp(max=1.0)
        summed = dict(zip(self.trained, grads, strict=True))
        new: Leaves = list(shards)
        opt: dict[str, dict[str, dict[str, Tensor]]] = {}
        for label, positions in self.positions.items():
            paths = self.paths[label]
            before = {
                name: [moment[path] for path in paths] for name, moment in state.opt[label].items()
            }
            updated = self.optimizers[label].update(
                state.step,
                [shards[i] for i in positions],
                [summed[i] for i in positions],
                before,
                self.donate,
                self._varying(factor, label),
            )
            given = {"params": [shards[i] for i in positions], **before}
            params, moments = _checked(updated, label, given)
            for i, p in zip(positions, params, strict=True):
                new[i] = p
            opt[label] = {
                name: dict(zip(paths, leaves, strict=True)) for name, leaves in moments.items()
            }
        after = State(state.step + 1, self.plan.unflatten(new), opt)
        return self._take_over(state, after) if self.donate else after

    def skip(self, state: State) -> State:
        """The state after a batch that is left out: of what was, only the clock goes on."""
        if self.donate:
            return self._take_over(state, state._replace(step=state.step + 1))
        frozen = self._frozen(state)
        leaves, spec = flatten(state)
        kept: State = unflatten(spec, [x if id(x) in frozen else x.clone() for x in leaves])
        return kept._replace(step=state.step + 1)

    def _take_over(self, before: State, after: State) -> State:
        """The new state under names of its own; the old one is left empty, so that no one reads it.

        But for its frozen leaves: those are not written to, and other states have them too.
        """
        frozen = self._frozen(before)
        old, _ = flatten(before)
        leaves, spec = flatten(after)
        leaves = [x if id(x) in frozen else x.detach() for x in leaves]
        with torch.no_grad():
            for x in old:
                if id(x) not in frozen:
                    x.set_()
        return unflatten(spec, leaves)

    def _frozen(self, state: State) -> set[int]:
        """The identities of a state's frozen leaves."""
        leaves, _ = flatten(state.params)
        return {id(x) for x, w in zip(leaves, self.plan.layouts, strict=True) if w.frozen}

    def _varying(self, factor: Tensor, label: str) -> Tensor:
        """One value of all ranks, where it meets shards: its derivative is summed over them."""
        axes = self.plan.rules[label].axes
        apart = torch._C._are_functorch_transforms_active() and self.plan.mesh.count(axes) > 1
        return pvary(factor, axes, self.comm) if apart else factor

    def rates(self, step: Tensor) -> dict[str, Tensor]:
        """The learning rates of this step, for the metrics."""
        rates = {f"lr/{label}": tx.rate(step) for label, tx in self.optimizers.items()}
        return {"lr": rates.popitem()[1]} if self.single and rates else rates


def _refuse_shared(state: State, trained: Sequence[int]) -> None:
    """Refuse to write into memory that two leaves have: the new value of one would be the other's.

    Frozen parameters are not written to, and may share theirs.
    """
    (params, _), (leaves, _) = flatten(state.params), flatten(state)
    frozen = {1 + i for i in range(len(params))} - {1 + i for i in trained}  # the step is first
    held = [(x.get_device(), start, i) for i, x in enumerate(leaves) if (start := x.data_ptr())]
    place, end, last = -1, 0, 0  # the CPU, as get_device calls it
    for device, start, i in sorted(held):
        if device == place and start < end and not {i, last} <= frozen:
            one, other = (show(path_strings(state)[j], "state") for j in (last, i))
            raise ValueError(
                f"{one} and {other} share memory, into which donate=True would write: begin the "
                "state with a clone of one of them"
            )
        if device != place or start + leaves[i].nbytes > end:
            place, end, last = device, start + leaves[i].nbytes, i


def _checked(
    updated: Any, label: str, given: Mapping[str, Leaves]
) -> tuple[Leaves, dict[str, Leaves]]:
    """What an optimizer's update has returned, or an error that says what it should have been."""
    name, count = f"optimizers[{label!r}].update", len(given["params"])
    names = sorted(given.keys() - {"params"})
    right = f"an update returns (params, moments), for {count} leaves and the moments {names}"
    if not (isinstance(updated, tuple) and len(updated) == 2 and isinstance(updated[1], Mapping)):
        found = (
            f"a tuple of {len(updated)}" if isinstance(updated, tuple) else type(updated).__name__
        )
        raise TypeError(f"{name} returned {found}: {right}")
    params, moments = updated
    if sorted(moments) != names:
        raise ValueError(f"{name} returned the moments {sorted(moments)}: {right}")
    for what, leaves in {"params": params, **moments}.items():
        if len(leaves) != count:
            raise ValueError(f"{name} returned {len(leaves)} leaves as {what!r}: {right}")
        for old, new in zip(given[what], leaves, strict=True):
            if (new.dtype, new.shape) != (old.dtype, old.shape):
                raise ValueError(
                    f"{name} returned {new.dtype} {tuple(new.shape)} among {what!r}, for "
                    f"{old.dtype} {tuple(old.shape)}"
                )
    return params, moments
