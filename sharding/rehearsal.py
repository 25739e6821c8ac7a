"""Rehearsal: a rank's program runs, nothing is computed or sent, and memory is added up.

Every operator gives a tensor of the right shape whose memory is never touched, so it takes no
memory to find out how much a program takes. Integers are computed, for they decide how many rows
go where; where they follow from numbers that are not there, as the choices of a router do, they
are spread evenly. Each of the other ranks is taken to send what this one sends.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .buffers import SMALL, Buffers
from .comm import Comm, Done, Op, Work
from .mesh import Mesh
from .specification import specification

R = TypeVar("R")
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap has its name since Python 3.13
# What gives memory to a tensor or takes it away is done, not only described.
DONE = ("aten::set_", "aten::resize_", "aten::lift_fresh")
# What is asked of numbers that are not there; a check of them is passed.
ANSWERS = {"aten::_local_scalar_dense": 1.0, "aten::allclose": True, "aten::equal": True}


class Memory:
    """Bytes of tensors that are alive, and the most there have been since ``restart``.

    >>> memory = Memory()
    >>> memory.seen(torch.empty(256))
    >>> memory.alive, memory.most
    (0, 1024)
    """

    def __init__(self) -> None:
        self.alive = self.most = 0
        self.known: set[int] = set()

    def restart(self) -> None:
        self.most = self.alive

    def seen(self, x: Tensor) -> None:
        """Count a tensor's storage until it is gone."""
        if x.is_meta:
            return
        storage = x.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.known or not nbytes:
            return
        self.known.add(key)
        self.alive += nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._gone, key, nbytes).atexit = False

    def _gone(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.alive -= nbytes


def rehearse(program: Callable[[Comm, Memory], R], mesh: Mesh, rank: int = 0) -> R:
    """``program(comm, memory)``, as the rank of a mesh whose other ranks are not there.

    Numbers that are not integers mean nothing in it; shapes, strides and what shares memory with
    what are those of a real rank. Temporary memory inside of an operator is not seen.

    >>> def program(comm, memory):
    ...     view, = comm.all_gather([torch.ones(2 ** 20)], ("edp",))
    ...     return view.shape, memory.most // 2 ** 20
    >>> rehearse(program, Mesh(edp=4))
    (torch.Size([4194304]), 20)
    """
    memory = Memory()
    with _Rehearsal(memory):
        return program(_Alone(mesh, rank), memory)


class _Alone(Comm):
    """A rank whose others send what it sends, into memory that is used again as on CPUs."""

    def __init__(self, mesh: Mesh, rank: int) -> None:
        super().__init__(mesh, rank)
        self.buffers = Buffers()

    def _start(self, op: Op, xs: list[Tensor]) -> Work:
        n, place = len(self.fiber(op.axes)), self.index(op.axes)
        if not all(x.is_floating_point() for x in xs):
            return Done(specification(op, place, [(op, xs)] * n))
        if op.kind == "all_to_all":
            return Done([x.new_empty(sum(op.receive), *x.shape[1:]) for x in xs])
        rows = {"all_gather": lambda k: k * n, "reduce_scatter": lambda k: k // n}
        rows_of = rows.get(op.kind, lambda k: k)
        shapes = [(rows_of(x.shape[0]), *x.shape[1:]) if x.dim() else () for x in xs]
        return Done([self.buffers.take(s, x) for s, x in zip(shapes, xs, strict=True)])


class _Rehearsal(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        leaves, spec = tree_flatten((args, kwargs))
        if name.startswith(DONE) or _is_known(name, leaves, kwargs):
            out = func(*args, **kwargs)
        elif name in ANSWERS:
            return ANSWERS[name]
        elif func._schema.is_mutable:
            return _written(func._schema, args, kwargs)
        else:
            out = _described(func, leaves, spec)
        tree_map_only(Tensor, self.memory.seen, out)
        return out


def _is_known(name: str, leaves: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether all that goes in are integers, which are there; or it never had any memory."""
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if any(x.is_meta for x in tensors):
        return True
    if any(x.is_floating_point() for x in tensors):
        return False
    dtype = kwargs.get("dtype")
    fills = name.split("::")[1] in ("empty", "zeros", "ones", "full", "empty_strided")
    return not fills or (dtype is not None and not dtype.is_floating_point)


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator gives that writes in place: its own arguments."""
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [a for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    returned = [given[a.name] for a in written[: len(schema.returns)]]
    return returned[0] if len(returned) == 1 else tuple(returned) or None


def _described(func: Any, leaves: list[Any], spec: Any) -> Any:
    """What an operator gives, found out on tensors that have no memory."""
    described = [_meta(x) if isinstance(x, Tensor) else x for x in leaves]
    args, kwargs = tree_unflatten(described, spec)
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    grouped = func._schema.name == "aten::_grouped_mm"  # whose description knows no float32
    outs, out_spec = tree_flatten(_grouped(*args) if grouped else func(*args, **kwargs))
    storages = {m.untyped_storage()._cdata for m in described if isinstance(m, Tensor)}
    if any(isinstance(x, Tensor) and x.untyped_storage()._cdata in storages for x in outs):
        args, kwargs = tree_unflatten(leaves, spec)  # it is a view
        return func(*args, **kwargs)
    results = [_made(x, func, leaves) if isinstance(x, Tensor) else x for x in outs]
    return tree_unflatten(results, out_spec)


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _grouped(x: Tensor, w: Tensor, ends: Tensor, *_: Any) -> Tensor:
    """Rows times a matrix for each group, or for each group the product of its columns and rows."""
    if w.dim() == 3:
        return x.new_empty(x.shape[0], w.shape[-1])
    return x.new_empty(ends.shape[0], x.shape[0], w.shape[-1])


def _made(meta: Tensor, func: Any, leaves: Sequence[Any]) -> Tensor:
    """Memory that nobody touches; integers that nothing has decided, spread over the last dim."""
    made = _reserved(meta)
    if meta.is_floating_point():
        return made
    choices = leaves[0].shape[-1] if isinstance(leaves[0], Tensor) and leaves[0].dim() else 1
    spread = torch.arange(meta.numel()).view(meta.shape) % choices
    return made.copy_(spread if "topk" in func._schema.name else torch.zeros_like(spread))


def _reserved(meta: Tensor) -> Tensor:
    """Addresses for a tensor: the system sets no memory aside for large ones until it is used."""
    nbytes = meta.untyped_storage().nbytes()
    if nbytes < SMALL:
        return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    flat = torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=meta.dtype)
    return flat.as_strided(meta.shape, meta.stride())
