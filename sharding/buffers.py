"""Buffers that are used again once nothing looks at them any more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 1 << 20  # bytes below which malloc hands out memory that is already mapped


class Buffers:
    """Memory for results whose sizes recur every step.

    A fresh large tensor on CPU costs a page fault per 4 KiB, more than the transfer into it. So
    storages are kept, and taken again when the pool holds the only reference to them: there is
    nothing to give back, and a result that somebody still holds is never overwritten. CUDA has an
    allocator that does this.
    """

    def __init__(self) -> None:
        self._storages: dict[int, list[torch.UntypedStorage]] = {}

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, of the dtype and on the device of ``like``.

        >>> buffers = Buffers()
        >>> x = buffers.take((1 << 20,), torch.empty(0))
        >>> address = x.data_ptr()
        >>> del x
        >>> buffers.take((1 << 20,), torch.empty(0)).data_ptr() == address
        True
        """
        count = 1
        for size in shape:
            count *= size
        nbytes = count * like.element_size()
        if nbytes < SMALL or like.device.type != "cpu" or not _can_count:
            return like.new_empty(shape)
        kept = self._storages.setdefault(nbytes, [])
        for storage in kept:
            if _references(storage) == 1:
                empty = torch.empty(0, dtype=like.dtype)
                # The stub wants strides as well.
                return empty.set_(storage, 0, tuple(shape))  # pyright: ignore[reportCallIssue]
        fresh = like.new_empty(shape)
        kept.append(fresh.untyped_storage())
        return fresh


_can_count = hasattr(torch._C, "_storage_Use_Count")


def _references(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)
