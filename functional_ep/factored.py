"""Factored: the gradient of expert weights, not multiplied out until an optimizer asks for it.

    dW_e = g_e^T x_e        factors g [R, O] and x [R, I], gradient [e, O, I]

With few rows for each expert the factors take a fraction of the gradient's memory, and an optimizer
that multiplies them out piece by piece reads each piece while the cache still has it: nothing of
the size of the weights is written and read again, least of all the zeros of experts without rows.
The norm needs no product either, ``|g^T x|^2 = sum(g g^T * x x^T)``, as long as an expert has few
rows; what many rows add up to is multiplied out at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sharding.node import accepted

PIECE = 1 << 18  # entries that are multiplied out at a time: what a core's cache holds
WIDE = (torch.float32, torch.float64)
CANCELLED = 1e-3  # of a sum's addends, when as little is left of them that rounding shows
MOVED = 20  # multiplications in the time that an entry takes to be written and read again
FACTORS = frozenset({"factors"})  # what a leaf accepts, see sharding.node.accept
RESHAPES = ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias")
Pieces = list[tuple[int, Tensor]]


class Product(NamedTuple):
    """``g^T x`` of one expert: its rows, and the product itself where that is the cheaper way."""

    g: Tensor
    x: Tensor
    made: Tensor | None

    @classmethod
    def of(cls, g: Tensor, x: Tensor) -> Product:
        rows, outs, ins = len(g), g.shape[1], x.shape[1]
        few = cls(g, x, None)
        return few.multiplied() if rows * rows * (outs + ins) > MOVED * outs * ins else few

    def multiplied(self) -> Product:
        """The same, with the product made."""
        return self._replace(made=self.g.t() @ self.x)

    @property
    def is_pending(self) -> bool:
        """Whether there are rows, and their product has yet to be made."""
        return self.made is None and len(self.g) > 0

    def write(self, out: Tensor) -> None:
        """All of the product."""
        if self.made is not None:
            out.copy_(self.made)
        elif len(self.g):
            torch.mm(self.g.t(), self.x, out=out)
        else:
            out.zero_()

    def squares(self) -> tuple[Tensor, Tensor]:
        """``|g^T x|^2``, and what it would be if none of its addends cancelled."""
        if self.made is not None:
            total = torch.stack([x.dot(x) for x in self.made.view(-1).split(PIECE)]).sum()
            return total, total
        of_g, of_x = (self.g @ self.g.t()).view(-1), (self.x @ self.x.t()).view(-1)
        return of_g.dot(of_x), of_g.abs_().dot(of_x.abs_())


class Factored(Tensor):
    """``dW_e = g_e^T x_e``, rows sorted by expert: a tensor that is computed when it is used.

    Any operation sees the gradient itself; reshaping leaves it in factors, and what would write
    into it is refused. :meth:`pieces` and :meth:`squares` do without the whole of it.

    >>> dw = Factored.of(torch.ones(3, 1), torch.ones(3, 2), [1, 2])
    >>> dw.flatten() + 0
    tensor([1., 1., 2., 2.])
    >>> dw.squares()
    tensor(10., dtype=torch.float64)
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    products: list[Product]

    @staticmethod
    def __new__(cls: type[Factored], products: list[Product], shape: Sequence[int]) -> Factored:
        like = products[0].g
        made: Any = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, storage_size=0
        )
        made.products = products
        return made

    @classmethod
    def of(cls, g: Tensor, x: Tensor, counts: Sequence[int]) -> Factored:
        """The gradient ``(e, O, I)`` of rows ``(R, O)`` and ``(R, I)``, so many for each expert."""
        gs, xs = (f.detach().contiguous().split_with_sizes(list(counts)) for f in (g, x))
        products = [Product.of(*rows) for rows in zip(gs, xs, strict=True)]
        return cls(products, (len(counts), g.shape[1], x.shape[1]))

    @classmethod
    def __torch_dispatch__(
        cls: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name in RESHAPES:
            whole, size, *_ = args
            shape = torch.empty(whole.shape, device="meta").view(size).shape
            return Factored(whole.products, shape)
        if name == "aten::detach":
            return args[0]
        if func._schema.is_mutable:
            raise TypeError(
                f"{name}: a gradient in factors is read, and not written into; an optimizer that "
                "writes into gradients says Optimizer(..., factored=False)"
            )
        args, kwargs = tree_map_only(Factored, Factored.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """The gradient as an ordinary tensor."""
        like, outs, ins = self._matrix
        whole = like.new_empty(len(self.products), outs, ins)
        for product, out in zip(self.products, whole.unbind(), strict=True):
            product.write(out)
        return whole.view(self.shape)

    def cuts(self) -> list[int]:
        """How many entries each piece has: some rows of an expert's matrix, in their order."""
        _, _, ins = self._matrix
        return [rows * ins for rows in self._blocks] * len(self.products)

    def pieces(self) -> Iterator[Pieces]:
        """Lists of ``(number, values)`` of pieces, which have each piece once.

        The values are the caller's to scale until it asks for the next list, which is written over
        them.
        """
        yield self._there()
        (like, _, ins), blocks = self._matrix, self._blocks
        pending = [
            (e * len(blocks) + i, rows, product.x)
            for e, product in enumerate(self.products)
            if product.is_pending
            for i, rows in enumerate(product.g.split(blocks, 1))
        ]
        buffers = like.new_empty(max(1, PIECE // (blocks[0] * ins)), blocks[0], ins).unbind()
        for start in range(0, len(pending), len(buffers)):
            found: Pieces = []
            some = pending[start : start + len(buffers)]
            for (number, g, x), buffer in zip(some, buffers, strict=False):
                values = torch.mm(g.t(), x, out=buffer[: g.shape[1]])
                found.append((number, values.view(-1)))
            yield found

    def squares(self) -> Tensor:
        """The sum of the squares of all entries.

        Multiplied out for it is what cancels too far, and what is too large or small for its rows
        to be squared.
        """
        some = [product for product in self.products if len(product.g)]
        if not some:
            return torch.zeros((), dtype=torch.float64)
        totals, addends = map(torch.stack, zip(*(each.squares() for each in some), strict=True))
        good = (totals > CANCELLED * addends) & totals.isfinite()
        for i in good.logical_not().nonzero().flatten().tolist():
            totals[i], _ = some[i].multiplied().squares()
        return totals.double().sum()

    def _there(self) -> Pieces:
        """What needs no product: those that are made, and zeros."""
        (like, _, ins), blocks = self._matrix, self._blocks
        zeros = like.new_zeros(blocks[0] * ins)
        found: Pieces = []
        for e, product in enumerate(self.products):
            if product.made is not None:
                parts = [rows.view(-1) for rows in product.made.split(blocks)]
            elif not product.is_pending:
                parts = [zeros[: rows * ins] for rows in blocks]
            else:
                continue
            found += enumerate(parts, e * len(blocks))
        return found

    @property
    def _blocks(self) -> list[int]:
        """How many rows of one expert's matrix each of its pieces has."""
        _, outs, ins = self._matrix
        block = min(outs, max(1, PIECE // ins))
        return [block] * (outs // block) + [outs % block] * (outs % block > 0)

    @property
    def _matrix(self) -> tuple[Tensor, int, int]:
        """A tensor of the right kind, and the size of one expert's matrix."""
        g, x, _ = self.products[0]
        return g, g.shape[1], x.shape[1]


def goes_in_factors(node: Any, g: Tensor, x: Tensor, counts: Sequence[int]) -> bool:
    """Whether a product, on its way to ``node`` in a backward pass, is better left in factors.

    It is if it goes straight to a leaf that accepts them, and they are at most half as large as it
    is. On a GPU one large product is faster than many small ones.
    """
    entries = len(counts) * g.shape[1] * x.shape[1]
    small = 0 < 2 * (g.numel() + x.numel()) <= entries
    if not small or g.is_cuda or g.dtype not in WIDE or torch.is_grad_enabled():
        return False
    return accepted(node) >= FACTORS
