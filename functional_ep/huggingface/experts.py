"""Routed experts of transformers, computed where they live: dispatch, local experts, combine.

Shape suffixes as in :mod:`functional_ep.moe`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import use_experts_implementation

from functional_ep.grouped import Counts, grouped_mm
from functional_ep.moe import Dispatched, bring_back, combine, dispatch
from functional_ep.swiglu import swiglu_mm
from sharding.closed import is_mapped
from sharding.comm import Comm
from sharding.mesh import Axes

Local = Callable[[Tensor, Counts], Tensor]  # rows sorted by local expert, and their counts
SILU = (nn.SiLU, SiLUActivation)
INTERFACE = ("hidden_states", "top_k_index", "top_k_weights")


class Place(NamedTuple):
    """Where a module's experts live, and who wants to know which of them were chosen."""

    experts: int
    axes: Axes
    comm: Comm
    chosen: Callable[[Tensor], None]

    @property
    def local(self) -> int:
        """Experts on each rank."""
        return self.experts // self.comm.mesh.count(self.axes)

    @property
    def first(self) -> int:
        """The first of this rank's experts."""
        return self.local * self.comm.mesh.index(self.comm.rank, self.axes)

    def visit(self, rows_RD: Tensor, ids_RK: Tensor, local: Local) -> Tensor:
        """``local_{id_rk}(rows_r)`` for every choice, at its expert's rank: ``(R, K, D)``."""
        return self._back(*self._there(rows_RD, ids_RK, local), ids_RK)

    def weigh(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, local: Local) -> Tensor:
        """``sum_k w_tk local_{id_tk}(x_t)``, in the wider dtype of weights and rows."""
        rows_RD, way = self._there(x_TD, ids_TK, local)
        wide = torch.promote_types(rows_RD.dtype, weights_TK.dtype)
        if wide.itemsize < 4:  # routing further on hangs on how transformers rounds each product
            return (self._back(rows_RD, way, ids_TK) * weights_TK[..., None]).sum(1)
        return combine(rows_RD, weights_TK, way, self.axes, self.comm, wide)

    def _there(self, rows: Tensor, ids: Tensor, local: Local) -> tuple[Tensor, Dispatched]:
        if is_mapped(ids):
            raise ValueError(
                "vmap over a converted model: each lane would send other rows to other experts. "
                "Call it once for each lane (lm.loss and functional_ep.moe do that by themselves)"
            )
        way = dispatch(rows, ids, self.experts, self.axes, self.comm)
        return local(way.rows_RD, way.counts_e), way

    def _back(self, rows_RD: Tensor, way: Dispatched, ids_TK: Tensor) -> Tensor:
        back = bring_back(rows_RD, way, self.axes, self.comm)
        return back.view(*ids_TK.shape, *back.shape[1:])


class Kind(NamedTuple):
    """A kind of experts module: how to know it, what it owns, and what replaces its forward."""

    name: str
    matches: Callable[[nn.Module], bool]
    stacked: Callable[[nn.Module], Sequence[str]]  # parameters whose dim 0 is split like experts
    experts: Callable[[nn.Module], int]
    forward: Callable[[Any, Place], Callable[..., Any]]


def is_decorated(module: nn.Module) -> bool:
    """Whether the class went through ``use_experts_implementation``.

    The decorator wraps ``forward`` and tells every instance how its weights are laid out.
    """
    return hasattr(type(module).forward, "__wrapped__") and hasattr(module, "is_transposed")


def has_interface(module: nn.Module) -> bool:
    """Whether forward takes what a router decides, and the module owns stacked matrices."""
    names = tuple(inspect.signature(type(module).forward).parameters)[1:4]
    return names == INTERFACE and any(p.dim() == 3 for p in module.parameters(recurse=False))


def own_stacked(module: nn.Module) -> list[str]:
    """The module's own parameters that have one entry per expert."""
    own = list(module.named_parameters(recurse=False))
    experts = count_stacked(module)
    return [name for name, p in own if p.dim() > 1 and p.shape[0] == experts]


def count_stacked(module: nn.Module) -> int:
    """How many experts the stacked matrices hold."""
    return next(p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3)


def weighed(place: Place, local: Local, x: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """``sum_k w_tk local_{id_tk}(x_t)``, multiplied after and summed as transformers does."""
    place.chosen(ids_TK)
    y_TD = place.weigh(x.reshape(-1, x.shape[-1]), ids_TK, weights_TK, local)
    return y_TD.view(x.shape).to(x.dtype)


Added = Callable[[str, Tensor, tuple[int, ...]], Iterable[Tensor]]


def decorated(module: Any, place: Place, added: Added | None = None) -> Callable[..., Tensor]:
    """By the contract of ``use_experts_implementation``: two products, and what lies between.

    ``added(name, rows, counts)`` is what adapters add to the product with a parameter.
    """
    fused = added is None and _is_swiglu(module)

    def product(name: str, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        y = _product(module, rows, name, counts)
        for more in () if added is None else added(name, rows, counts):
            y = y + more.to(y.dtype)
        return y

    def local(rows_RD: Tensor, counts_e: tuple[int, ...]) -> Tensor:
        if fused:
            down = _weight(module, "down_proj")
            gate_up = product("gate_up_proj", rows_RD, counts_e)
            y = swiglu_mm(gate_up.to(down.dtype), down, counts_e)
        elif module.has_gate:
            h = module._apply_gate(product("gate_up_proj", rows_RD, counts_e))
            y = product("down_proj", h, counts_e)
        else:
            h = module.act_fn(product("up_proj", rows_RD, counts_e))
            y = product("down_proj", h, counts_e)
        return module.post_expert_norm(y) if has_post_norm(module) else y

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return weighed(place, local, hidden_states, top_k_index, top_k_weights)

    return forward


def has_post_norm(module: Any) -> bool:
    return bool(getattr(module, "has_post_expert_norm", False))


def _is_swiglu(module: Any) -> bool:
    """Whether ``silu(gate) * up`` lies between the products: the decorator's gate, not its own."""
    if not module.has_gate or module.has_bias:
        return False
    default = type(module)._apply_gate.__module__ == use_experts_implementation.__module__
    return default and isinstance(module.act_fn, SILU)


def _weight(module: Any, name: str) -> Tensor:
    """One matrix per expert, output dim first."""
    weight = getattr(module, name)
    return weight.mT if module.is_transposed else weight


def _product(module: Any, rows: Tensor, name: str, counts: tuple[int, ...]) -> Tensor:
    weight = _weight(module, name)
    rows = rows.to(weight.dtype)
    y = grouped_mm(rows, weight, counts)
    if not module.has_bias:
        return y
    bias = getattr(module, f"{name}_bias")
    return y + grouped_mm(rows.new_ones(len(rows), 1), bias[..., None], counts)


def undecorated(module: Any, place: Place) -> Callable[..., Tensor]:
    """The class's own forward on the local experts, whose matrices come apart once."""
    return own_forward(module, place, own_stacked(module))


def own_forward(module: Any, place: Place, apart: Sequence[str] = ()) -> Callable[..., Tensor]:
    """The class's own forward on the local experts, one choice per row, with weight one."""
    own = type(module).forward
    module.num_experts = place.local

    def local(rows_RD: Tensor, counts_e: Counts) -> Tensor:
        numbers = counts_e.on(rows_RD.device)
        ids = torch.arange(place.local, device=rows_RD.device)
        ids_R1 = torch.repeat_interleave(ids, numbers, output_size=len(rows_RD))[:, None]
        with _unbound(module, apart):
            y = own(module, rows_RD, ids_R1, rows_RD.new_ones(len(rows_RD), 1))
        return y.reshape(rows_RD.shape)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return weighed(place, local, hidden_states, top_k_index, top_k_weights)

    return forward


class _Stack:
    """Stacked matrices that come apart once: the gradient is one stack, not a sum of E of them."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self.each = whole, whole.unbind()

    def __getitem__(self, i: Any) -> Tensor:
        is_number = isinstance(i, int) or (isinstance(i, Tensor) and not i.dim())
        return self.each[int(i)] if is_number else self.whole[i]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    @classmethod
    def __torch_function__(
        cls, f: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        whole = [x.whole if isinstance(x, _Stack) else x for x in args]
        return f(*whole, **(kwargs or {}))


@contextmanager
def _unbound(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    before = {name: module._parameters[name] for name in names}
    try:
        for name in names:
            stack: Any = _Stack(getattr(module, name))
            module._parameters[name] = stack
        yield
    finally:
        module._parameters.update(before)


DECORATED = Kind("decorated", is_decorated, own_stacked, count_stacked, decorated)
UNDECORATED = Kind("own forward", has_interface, own_stacked, count_stacked, undecorated)
