"""Bytes that a rank has to send, counted where torch dispatches the collectives of any library.

Counted is what every exchange must carry: ``(n - 1)/n`` of the whole for all-gather and
reduce-scatter, twice that for all-reduce, rows for others in an all-to-all. How often a transport
copies them on the way is not.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INPUTS = ("input", "inputs", "input_tensor", "input_tensors", "input_list", "tensor", "tensors")
GROUP = ("process_group", "group_name")
SILENT = ("barrier", "monitoredbarrier", "recv", "irecv")


class Traffic(TorchDispatchMode):
    """``sent``: bytes that this rank's collectives sent while this was active."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:  # takes itself apart, and the parts come here
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            names = [argument.name for argument in func._schema.arguments]
            self.sent += _sent(func._schema.name, dict(zip(names, args, strict=False)))
        return func(*args, **kwargs or {})


def _sent(operation: str, args: dict[str, Any]) -> int:
    kind = operation.split("::")[1].replace("_", "")
    if kind.startswith(SILENT) or not any(name in args for name in GROUP):
        return 0
    group, whole = _group(args), sum(map(_bytes, (args[name] for name in INPUTS if name in args)))
    n = group.size()
    if kind.startswith("allgather"):
        return (n - 1) * whole
    if kind.startswith("reducescatter"):
        return (n - 1) * whole // n
    if kind.startswith("allreduce"):
        return 2 * (n - 1) * whole // n
    if kind.startswith("alltoall"):
        rows = args.get("input_split_sizes") or [1] * n
        return whole * (sum(rows) - rows[group.rank()]) // max(sum(rows), 1)
    if kind.startswith("broadcast"):
        root = args["root_rank"] if "root_rank" in args else dist.get_group_rank(group, args["src"])
        return (n - 1) * whole if group.rank() == root else 0
    raise NotImplementedError(f"bytes of {operation}")


def _group(args: dict[str, Any]) -> Any:
    if "process_group" in args:
        return dist.ProcessGroup.unbox(args["process_group"])
    named: Any = args["group_name"]
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(named) if isinstance(named, str) else named


def _bytes(x: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(x) if isinstance(t, Tensor))
