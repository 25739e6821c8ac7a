"""Fetched: gathered views, given up after the forward pass and fetched again in the backward.

Autograd keeps what a backward pass will need. Whatever it would keep of a gathered view is replaced
by a note which view it was; reading the note gathers the block's views again, once, and starts the
gather of the block before it. No recomputation, no view kept alive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch._C._functorch as _functorch
from torch import Tensor
from torch._C import _autograd
from torch._functorch.eager_transforms import grad_increment_nesting

from .comm import Comm, Work
from .gather import Gather
from .node import Node
from .plain import plain


def can_release(shards: Sequence[Tensor]) -> bool:
    """Whether views may be gathered again outside of all transforms.

    True of plain autograd and of one ``grad`` or ``vjp``. Under nested transforms the view itself
    is differentiated in the outer ones, so it has to stay.
    """
    stack = _functorch.get_interpreter_stack()
    if not stack:
        return not any(map(_functorch.is_functorch_wrapped_tensor, shards))
    alone = len(stack) == 1 and stack[0].key() == _functorch.TransformType.Grad
    return alone and not any(x.requires_grad for x in map(plain, shards))


class _Note(NamedTuple):
    """Instead of a saved tensor: which view it is part of, and which part."""

    view: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Fetched:
    """The gathered views of one block, while a backward pass needs them.

    ``at_once`` says that the backward pass needs them first of all, so they stay until then.
    """

    def __init__(
        self,
        gather: Gather,
        shards: Sequence[Tensor],
        comm: Comm,
        views: Sequence[Tensor],
        previous: Fetched | None,
        at_once: bool,
    ) -> None:
        self.gather, self.comm, self.previous = gather, comm, previous
        self.shards = [plain(x).detach() for x in shards]
        self.versions = [x._version for x in self.shards]
        self.places = {
            x.untyped_storage().data_ptr(): (i, x.storage_offset())
            for i, x in enumerate(map(plain, views))
            if gather.layouts[i].is_fetched and x.numel()
        }
        self.witness = torch.empty(0)  # wrapped by the transform that is active, if there is one
        self.noted = False
        self.under_way: Work | None = None
        # What the backward pass begins with is not worth giving up in between.
        self.views = [plain(x).detach() for x in views] if at_once else None
        self.read = False

    def prefetch(self) -> None:
        """Start gathering, unless that was done or the backward pass has no use for these views."""
        if not self.noted:
            if self.previous is not None:
                self.previous.prefetch()
        elif self.views is None and self.under_way is None:
            if [x._version for x in self.shards] != self.versions:
                raise RuntimeError(
                    "shards were changed in place after the forward pass, and the backward pass "
                    "gathers them again: take the gradient first, or use backward='keep'"
                )
            self.under_way = self.gather.start(self.shards, self.comm)

    def get(self) -> list[Tensor]:
        """The views, gathered unless they are there; the first call prefetches the block before."""
        if self.views is None:
            self.prefetch()
            assert self.under_way is not None
            self.views, self.under_way = self.under_way.wait(), None
        if not self.read:
            self.read = True
            if self.previous is not None:
                self.previous.prefetch()
        return self.views

    def drop(self) -> None:
        """Let the views go: the backward pass of the block is done."""
        self.views, self.read = None, False

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While this is active, autograd saves notes instead of views."""
        refusal = _autograd._saved_tensors_hooks_get_disabled_error_message()
        if not torch._C._are_functorch_transforms_active():
            refusal = None  # whoever it is that forbids them, it is not torch.func
        if refusal is not None:  # torch.func forbids hooks; one level of grad serves ours
            _autograd._saved_tensors_hooks_enable()
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._note, self._read):
                yield
        finally:
            if refusal is not None:
                _autograd._saved_tensors_hooks_disable(refusal)

    def _note(self, saved: Tensor) -> Tensor | _Note:
        x = plain(saved)
        kept = saved.detach()  # itself, it would hold the graph that holds it
        if x.layout is not torch.strided:
            return kept
        place = self.places.get(x.untyped_storage().data_ptr())
        if place is None or x.dtype != self.gather.layouts[place[0]].compute_dtype:
            return kept
        self.noted = True
        view, start = place
        offset = int(x.storage_offset() - start)
        return _Note(view, tuple(x.shape), x.stride(), offset)

    def _read(self, note: Tensor | _Note) -> Tensor:
        if isinstance(note, Tensor):
            return note
        view = self.get()[note.view]
        part = view.as_strided(note.size, note.stride, view.storage_offset() + note.offset)
        return _like(self.witness, part)


HOOKS = (Fetched._note, plain)  # which autograd calls while a block computes


def _like(witness: Tensor, x: Tensor) -> Tensor:
    """x, as a constant if the transform under which the witness was made has ended.

    ``vjp`` pulls back after it has ended, with ``create_graph``. What it saved is no variable any
    more; so must x be, or the gradients would hold on to the graph of the whole forward pass.
    """
    if _functorch.unwrap_if_dead(witness) is witness:
        return x
    with grad_increment_nesting() as level:
        return _functorch._wrap_for_grad(x, level)


def release_after_backward(fetched: Fetched, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The views themselves; once all their gradients are there, ``fetched`` lets its copy go."""
    return _Release.apply(fetched, *views)


class _Release(Node):
    @staticmethod
    def forward(fetched: Fetched, *views: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in views)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fetched = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.fetched.drop()
        return None, *grads
