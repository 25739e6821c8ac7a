"""A device that is elsewhere, as a GPU is: its numbers cannot be read without waiting for them.

What runs there is computed on the CPU, so that it can be compared. Refused is what a GPU would
refuse, tensors of two devices in one operation; and counted is what lets the host wait: numbers
that are read, shapes that depend on numbers, and tensors that come from the host's own memory.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

# The one device beside the CPU that every torch can differentiate on. What is said of tensors on
# it never reaches torch's own "meta" kernels.
ELSEWHERE = torch.device("meta", 1)
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_unique2"}
COPIES = {"_to_copy", "copy_"}
FUSED = "_fused", "_foreach"  # which take no scalar of the CPU's among their tensors
NOTED = {  # what torch only makes a note of, and not here, where notes are not read
    torch.ops.aten._conj.default: torch.ops.aten._conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}
OURS = tuple(str(Path(__file__).parents[1] / name) for name in ("sharding", "functional_ep"))


class Remote(Tensor):
    """A tensor elsewhere; ``near`` has its numbers."""

    near: Tensor
    is_cuda = True
    is_cpu = is_meta = False
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[Remote], near: Tensor) -> Remote:
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=ELSEWHERE,
        )
        made.near = near
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Remote({self.near})"

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.near.untyped_storage()

    def tolist(self) -> Any:
        Waits.of_this_thread().add("read")
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} of a tensor elsewhere, outside of its device")


class Waits(TorchDispatchMode):
    """Meanwhile tensors can be made elsewhere; ``counts`` has ``{(what, line): how often}``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    @staticmethod
    def of_this_thread() -> Waits:
        modes = _get_current_dispatch_mode_stack()
        return next(mode for mode in modes if isinstance(mode, Waits))

    def add(self, what: str) -> None:
        ours = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
        line = f"{Path(ours[-1].filename).name}: {ours[-1].line}" if ours else "the test itself"
        self.counts[what, line] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func._schema.name.removeprefix("aten::")
        leaves, spec = tree_flatten((args, kwargs))
        remote = [x for x in leaves if isinstance(x, Remote)]
        near = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Remote)]
        stays = (
            torch.device(kwargs["device"]) == ELSEWHERE if kwargs.get("device") else bool(remote)
        )
        if name in COPIES:
            stays = stays if name == "_to_copy" else isinstance(args[0], Remote)
            self._copied(near, remote, stays)
        elif remote:
            alone = name.startswith(FUSED)
            assert not any(x.dim() or alone for x in near), f"{name} of tensors on two devices"
            if name.startswith("_fused"):  # parameters, gradients and moments
                kinds = {x.dtype for column in args[:4] for x in column}
                assert len(kinds) == 1, f"{name} of tensors of {kinds}"
                assert all(x.dtype == torch.float32 for x in args[5]), "a step is a float32 there"
            if name in READS or _is_masked(name, args):
                self.add("read")
        leaves = [x.near if isinstance(x, Remote) else x for x in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        func = NOTED.get(func, func)
        out = func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
        if not stays:
            return out
        same = {id(x.near): x for x in remote}  # what is written in place is the argument
        return tree_map_only(Tensor, lambda y: same[id(y)] if id(y) in same else Remote(y), out)

    def _copied(self, near: list[Tensor], remote: list[Remote], stays: bool) -> None:
        if remote and not stays:
            self.add("read")
        elif stays and near:
            self.add("sent")


def _is_masked(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a mask chooses entries, so that their number has to be known."""
    masks = [x for x in args[1] if x is not None] if name in ("index", "index_put_") else []
    return any(x.dtype in (torch.bool, torch.uint8) for x in masks)


def _born(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor`` makes tensors of this one device without telling anyone."""

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device) != ELSEWHERE or isinstance(data, Remote):
            return make(data, **kwargs)
        return make(data, **kwargs).to(ELSEWHERE)

    return made


@contextmanager
def elsewhere() -> Iterator[None]:
    """Meanwhile ``with Waits()`` makes a thread's tensors elsewhere possible."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _born(getattr(torch, name)))
        yield


def there(tree: Any) -> Any:
    return optree.tree_map(lambda x: x.to(ELSEWHERE), tree)


def here(tree: Any) -> Any:
    """The numbers, with nothing waiting."""
    return optree.tree_map(lambda x: x.near if isinstance(x, Remote) else x, tree)
