"""Sharding rules for pytrees of tensors, as pure functions on torch.func.

A :class:`Mesh` names the axes of the ranks, a :class:`Rule` says along which of them a leaf is
split, a :class:`~sharding.plan.Plan` gives every leaf a rule, and :func:`sharded` turns a function
of whole tensors into one of shards. :func:`simulate` runs all ranks in this process,
:func:`distributed` makes this process one of them.
"""

from .collectives import all_gather, all_to_all, psum, pvary, reduce_scatter
from .comm import Comm, Divergence
from .distributed import distributed
from .gather import Precision
from .inner import dot
from .leaf import Leaf
from .mesh import Mesh
from .plan import Plan, make_plan
from .reshard import reshard
from .rule import Rule, expert_parallel, interval, partition, replicated, unpartition, zero3
from .sharded import sharded
from .simulate import simulate

__all__ = [
    "Comm",
    "Divergence",
    "Leaf",
    "Mesh",
    "Plan",
    "Precision",
    "Rule",
    "all_gather",
    "all_to_all",
    "distributed",
    "dot",
    "expert_parallel",
    "interval",
    "make_plan",
    "partition",
    "psum",
    "pvary",
    "reduce_scatter",
    "replicated",
    "reshard",
    "sharded",
    "simulate",
    "unpartition",
    "zero3",
]
