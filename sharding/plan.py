"""Plan: which leaf follows which rule. Everything that can be wrong statically is refused here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import optree
from torch import Tensor

from .arguments import check_kinds, check_structure, frozen_labels, precision_by_label
from .collectives import all_gather
from .comm import Comm
from .footprint import footprint
from .gather import Layout, Precision, gather
from .leaf import Leaf, make_leaf, refuse_repeated
from .mesh import Axes, Mesh
from .rule import Rule, is_first_copy, partition
from .tree import describe_difference, flatten, path_strings, show, structure, unflatten


class Copy(NamedTuple):
    """A rank's shard among those that are equal: along which axes, and whether sums count it."""

    axes: Axes
    counts: bool


@dataclass(frozen=True)
class Plan:
    """A pytree of :class:`Leaf` in the shape of the params, with a rule for every label.

    ``plan["blocks"][0]`` is the plan of a subtree; ``plan.at(tree)`` that of any tree of its
    leaves; ``print(plan)`` a table of bytes per rank and label.

    >>> import torch
    >>> from sharding import zero3
    >>> rules = {"dense": zero3("edp")}
    >>> print(make_plan({"w": torch.zeros(4, 64)}, {"w": "dense"}, rules, Mesh(edp=2)))
    Plan on Mesh(edp=2), per rank
    label  leaves  entries  rule                          stored  view     sent/step
    dense  1       256      compute=- store=edp copies=-  512 B   1.0 KiB  1.5 KiB
    """

    tree: Any
    rules: Mapping[str, Rule]
    mesh: Mesh
    precision: Mapping[str, Precision] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    @cached_property
    def leaves(self) -> list[Leaf]:
        """The leaves in the order in which optree flattens them."""
        return flatten(self.tree)[0]

    @cached_property
    def spec(self) -> optree.PyTreeSpec:
        """The structure of the params."""
        return structure(self.tree)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Each leaf's rule, worked out on the mesh."""
        whole = Precision()
        return tuple(
            Layout(
                self.rules[leaf.label],
                self.mesh,
                leaf.shape,
                leaf.dtype,
                self.precision.get(leaf.label, whole),
                leaf.label in self.frozen,
            )
            for leaf in self.leaves
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in use, in the order of the rules."""
        used = {leaf.label for leaf in self.leaves}
        return tuple(label for label in self.rules if label in used)

    @property
    def trained(self) -> tuple[str, ...]:
        """The labels in use that are not frozen: those that have an optimizer."""
        return tuple(label for label in self.labels if label not in self.frozen)

    @cached_property
    def trained_positions(self) -> tuple[int, ...]:
        """Which of the leaves have a gradient: those that are not frozen, in their order."""
        return tuple(i for i, layout in enumerate(self.layouts) if not layout.frozen)

    def at(self, tree: Any) -> Plan:
        """The plan of a tree whose leaves are leaves of this one, in any arrangement.

        A leaf may appear more than once: a tied embedding is one leaf used twice.
        """
        return Plan(tree, self.rules, self.mesh, self.precision, self.frozen)

    def __getitem__(self, key: Any) -> Plan:
        return self.at(self.tree[key])

    def flatten(self, tree: Any, what: str = "params") -> list[Any]:
        """The leaves of a tree in the shape of the params, or an error that names what differs."""
        leaves, spec = flatten(tree)
        if spec != self.spec:
            raise ValueError(
                f"{what} do not have the structure of the plan:\n"
                + describe_difference(tree, self.tree, what)
            )
        return leaves

    def unflatten(self, leaves: list[Any]) -> Any:
        """A tree in the shape of the params."""
        return unflatten(self.spec, leaves)

    def shard(self, params: Any, comm: Comm) -> Any:
        """Global params to this rank's shards, tensors of their own; moves nothing.

        Raises:
            ValueError: another structure, shape or dtype than the plan's, or another mesh.
        """
        self.check_mesh(comm)
        shards: list[Tensor] = []
        for x, leaf in zip(self.flatten(params), self.leaves, strict=True):
            if not isinstance(x, Tensor) or (tuple(x.shape), x.dtype) != (leaf.shape, leaf.dtype):
                found = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)
                raise ValueError(f"{leaf} {leaf.dtype} expected, found {found}")
            shards.append(partition(self.rules[leaf.label], self.mesh, comm.rank, x))
        return self.unflatten(shards)

    def full(self, shards: Any, comm: Comm) -> Any:
        """Every rank's shards to the global params, on every rank: the inverse of :meth:`shard`.

        Differentiable, as a view is: the gradients of all ranks' results are summed. Leaves travel
        one after another, so what they travel in is as large as the largest.
        """
        whole: list[Tensor] = []
        for x, w in zip(self.check_shards(shards, comm), self.layouts, strict=True):
            (view,) = gather([Layout(w.rule, w.mesh, w.shape, w.dtype)], [x], comm)
            axes = w.rule.compute
            flat = all_gather(view.reshape(-1), axes, comm) if axes else view
            whole.append(flat.reshape(w.shape).clone())
        return self.unflatten(whole)

    def copies(self, comm: Comm) -> list[Copy]:
        """For each leaf, which ranks hold this rank's shard too, and whether this one counts."""
        return [Copy(w.copies, is_first_copy(w.rule, self.mesh, comm.rank)) for w in self.layouts]

    def check_mesh(self, comm: Comm) -> None:
        """Refuse ranks of another mesh."""
        if comm.mesh != self.mesh:
            raise ValueError(f"the plan was made for {self.mesh}, but the ranks form {comm.mesh}")

    def check_whole(self, in_parts: Callable[[str], bool]) -> None:
        """Refuse to split a leaf while computing, but for those paths that are computed in parts.

        The view of another would be a part taken for the whole: a router would not know of the
        experts of other ranks.
        """
        for leaf in self.leaves:
            axes = self.rules[leaf.label].compute
            if axes and not in_parts(leaf.path):
                raise ValueError(
                    f"{leaf} has the label {leaf.label!r}, whose rule splits it over {axes} while "
                    "computing; only stacks of experts are computed in parts: give it another label"
                )

    def check_shards(self, shards: Any, comm: Comm) -> list[Tensor]:
        """The leaves of a tree of shards, or an error that names the leaf that is none."""
        self.check_mesh(comm)
        leaves = self.check_sizes(shards, "shards")
        for x, leaf in zip(leaves, self.leaves, strict=True):
            if x.dtype != leaf.dtype:
                where = show(leaf.path, "shards")
                raise ValueError(f"{where}: {leaf.dtype} expected, found {x.dtype}")
        return leaves

    def check_sizes(self, tree: Any, what: str) -> list[Tensor]:
        """The leaves of a tree of tensors that are as large as shards, of whatever dtype."""
        leaves = self.flatten(tree, what)
        for x, leaf, layout in zip(leaves, self.leaves, self.layouts, strict=True):
            if not isinstance(x, Tensor) or x.shape != (layout.shard_size,):
                found = tuple(x.shape) if isinstance(x, Tensor) else repr(x)
                raise ValueError(
                    f"{show(leaf.path, what)}: a shard ({layout.shard_size},) of {leaf.shape} "
                    f"expected, found {found}; shards come from plan.shard(params, comm)"
                )
        return leaves

    def __str__(self) -> str:
        by_label: dict[str, list[Layout]] = {label: [] for label in self.labels}
        for leaf, layout in zip(self.leaves, self.layouts, strict=True):
            by_label[leaf.label].append(layout)
        return f"Plan on {self.mesh}, per rank\n{footprint(by_label)}"


def make_plan(
    params: Any,
    label_of: Any | Callable[[Any], Any],
    rules: Mapping[str, Rule],
    mesh: Mesh,
    precision: Precision | Mapping[str, Precision] | None = None,
    frozen: Collection[str] = (),
) -> Plan:
    """A label for every leaf, a rule for every label: the plan that gather and reduce follow.

    Args:
        params: a pytree of floating-point tensors, or of meta tensors: only shape and dtype count.
        label_of: a pytree of labels in the shape of the params, or a function from params to one.
        rules: one rule for each label.
        mesh: the ranks.
        precision: what gathering casts to and reducing sums in, for all labels or by label.
        frozen: labels that are not trained: their leaves are stored and gathered like others, but
            have no gradient, no reduction and no optimizer.

    Raises:
        ValueError: with path, found, expected and fix, for: a label without a rule, or a rule, a
            precision or ``frozen`` without a leaf; an axis not on the mesh; dim 0 not divisible by
            the compute axes; a leaf that is no floating-point tensor (``None`` included).
        TypeError: rules, a mesh or a precision that are something else.

    >>> import torch
    >>> from sharding import zero3
    >>> params = {"w": torch.zeros(4, 2), "b": torch.zeros(2)}
    >>> plan = make_plan(params, {"w": "dense", "b": "dense"}, {"dense": zero3("edp")}, Mesh(edp=2))
    >>> plan["w"].tree
    Leaf(path='w', shape=(4, 2), dtype=torch.float32, label='dense')
    """
    check_kinds(rules, mesh)
    leaves, spec = flatten(params)
    paths = path_strings(params)
    refuse_repeated(paths)
    labels_tree = label_of(params) if callable(label_of) else label_of
    check_structure(labels_tree, params)
    labels, _ = flatten(labels_tree)
    made = [make_leaf(*each, rules, mesh) for each in zip(paths, leaves, labels, strict=True)]
    idle = [label for label in rules if label not in set(labels)]
    if idle:
        raise ValueError(
            f"rules[{idle[0]!r}] has no leaf: the labels in use are {sorted(set(labels))}. "
            f"Remove the rule, or label a leaf {idle[0]!r}"
        )
    by_label, still = precision_by_label(precision, rules), frozen_labels(frozen, rules)
    return Plan(unflatten(spec, made), dict(rules), mesh, by_label, still)
