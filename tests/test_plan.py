"""Plans: everything that can be wrong statically is refused, with path, found, expected and fix."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from optree import tree_map

from sharding import (
    Leaf,
    Mesh,
    Plan,
    Precision,
    Rule,
    expert_parallel,
    make_plan,
    replicated,
    sharded,
    simulate,
    zero3,
)

MESH = Mesh(edp=2, ep=2)
PARAMS: Any = {"blocks": [{"w1": torch.zeros(4, 3), "b": torch.zeros(3)}], "head": torch.zeros(5)}
LABELS: Any = {"blocks": [{"w1": "expert", "b": "dense"}], "head": "dense"}
RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep", store=("edp",))}


def with_w1(x: Any) -> dict[str, Any]:
    return {"blocks": [{"w1": x, "b": torch.zeros(3)}], "head": torch.zeros(5)}


def test_a_plan_says_where_every_leaf_lives() -> None:
    plan = make_plan(PARAMS, LABELS, RULES, MESH)
    leaf = Leaf("blocks/0/w1", (4, 3), torch.float32, "expert")
    assert plan["blocks"][0]["w1"].tree == plan.tree["blocks"][0]["w1"] == leaf
    assert [leaf.path for leaf in plan.leaves] == ["blocks/0/b", "blocks/0/w1", "head"]
    assert plan.labels == ("dense", "expert")
    assert [w.view_shape for w in plan.layouts] == [(3,), (2, 3), (5,)]
    assert make_plan(PARAMS, lambda params: LABELS, RULES, MESH) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_only_shapes_and_dtypes_of_the_params_are_read() -> None:
    meta = tree_map(lambda x: x.to("meta"), PARAMS)
    assert make_plan(meta, LABELS, RULES, MESH) == make_plan(PARAMS, LABELS, RULES, MESH)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "a label without a rule",
        {"rules": {"dense": zero3("ep")}},
        "params['blocks'][0]['w1'] (4, 3) has the label 'expert', which has no rule: "
        "rules are for ['dense']",
    ),
    (
        "a rule without a leaf",
        {"rules": RULES | {"spare": replicated()}},
        "rules['spare'] has no leaf: the labels in use are ['dense', 'expert']. "
        "Remove the rule, or label a leaf 'spare'",
    ),
    (
        "an axis that is not on the mesh",
        {"rules": RULES | {"expert": expert_parallel("tp")}},
        "rules['expert'] = Rule(compute=('tp',), store=()): axis 'tp' is not on "
        "Mesh(edp=2, ep=2): name axes among 'edp', 'ep'",
    ),
    (
        "experts that the ranks do not divide",
        {"params": with_w1(torch.zeros(6, 3)), "mesh": Mesh(edp=1, ep=4)},
        "params['blocks'][0]['w1'] (6, 3), label 'expert': dim 0 must divide by the 4 ranks of the "
        "compute axes ('ep',) of Mesh(edp=1, ep=4). Choose a mesh whose ep divides 6, or label the "
        "leaf otherwise",
    ),
    (
        "a scalar expert",
        {"params": with_w1(torch.zeros(()))},
        "params['blocks'][0]['w1'] (), label 'expert': dim 0 must divide by the 2 ranks",
    ),
    (
        "a leaf that is None",
        {"params": with_w1(None)},
        "params['blocks'][0]['w1'] is None: a parameter is a floating-point tensor. Leave out "
        "what is no parameter, and pass constants to the loss as arguments",
    ),
    ("a number", {"params": with_w1(0.5)}, "params['blocks'][0]['w1'] is 0.5: a parameter is a"),
    (
        "an integer tensor",
        {"params": with_w1(torch.zeros(4, 3, dtype=torch.int64))},
        "params['blocks'][0]['w1'] (4, 3) is torch.int64: a parameter has a floating-point dtype",
    ),
    (
        "labels of another structure",
        {"label_of": {"blocks": [{"w1": "expert", "bias": "dense"}], "head": "dense"}},
        "labels and params differ:\n  missing params['blocks'][0]['b']\n"
        "  unexpected params['blocks'][0]['bias']",
    ),
    (
        "labels that are None",
        {"label_of": {"blocks": [{"w1": None, "b": "dense"}], "head": "dense"}},
        "params['blocks'][0]['w1'] (4, 3) has the label None, which has no rule",
    ),
    (
        "one label",
        {"label_of": "dense"},
        "the labels are 'dense', and have to be a tree in the shape of the params, or a function "
        "that makes one: label_by_path({}, default='dense')",
    ),
    (
        "a precision for no label",
        {"precision": {"experts": Precision()}},
        "precision['experts']: no such label; rules are for ['dense', 'expert']",
    ),
]


@pytest.mark.parametrize(
    ("changed", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_make_plan_refuses(changed: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"params": PARAMS, "label_of": LABELS, "rules": RULES, "mesh": MESH}
    make_plan(**right)
    with pytest.raises(ValueError) as caught:
        make_plan(**(right | changed))
    assert str(caught.value).startswith(message)


BF16 = torch.bfloat16
OF_ANOTHER_KIND: list[tuple[dict[str, Any], str]] = [
    ({"mesh": 2}, "mesh=2: a Mesh is needed"),
    ({"rules": [replicated()]}, "rules=[Rule(compute=(), store=())]: a dict of one Rule for each"),
    ({"rules": {"dense": ("edp",)}}, "rules['dense'] = ('edp',): a Rule is needed"),
    ({"precision": BF16}, "precision=torch.bfloat16: wanted is Precision(compute=torch.bfloat16)"),
    ({"precision": "bf16"}, "precision='bf16': wanted is Precision(compute=torch.bfloat16)"),
    ({"precision": {"dense": BF16}}, "precision['dense'] = torch.bfloat16: wanted is"),
    ({"precision": Precision("bf16")}, "Precision(compute='bf16'): a floating-point dtype"),  # pyright: ignore[reportArgumentType]
    ({"precision": Precision(reduce=torch.int64)}, "Precision(reduce=torch.int64): a floating"),
]


@pytest.mark.parametrize(("changed", "message"), OF_ANOTHER_KIND)
def test_make_plan_refuses_other_kinds(changed: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"params": PARAMS, "label_of": LABELS, "rules": RULES, "mesh": MESH}
    with pytest.raises(TypeError) as caught:
        make_plan(**(right | changed))
    assert str(caught.value).startswith(message)


def test_a_rule_refuses_a_repeated_axis() -> None:
    with pytest.raises(ValueError) as caught:
        Rule(compute=("ep",), store=("edp", "ep"))
    expected = "axis 'ep' is named twice; it splits a leaf once"
    assert str(caught.value) == f"Rule(compute=('ep',), store=('edp', 'ep')): {expected}"


# -- params and shards that are not the plan's ---------------------------------------------------


def shards_with(head: Any) -> Any:
    return lambda comm, plan: plan.shard(PARAMS, comm) | {"head": head}


NOT_OF_THE_PLAN: list[tuple[str, Any, Any, str]] = [
    (
        "another shape",
        lambda comm, plan: with_w1(torch.zeros(4, 4)),
        Plan.shard,
        "params['blocks'][0]['w1'] (4, 3) torch.float32 expected, found (4, 4) torch.float32",
    ),
    (
        "another dtype",
        lambda comm, plan: with_w1(torch.zeros(4, 3).double()),
        Plan.shard,
        "params['blocks'][0]['w1'] (4, 3) torch.float32 expected, found (4, 3) torch.float64",
    ),
    (
        "no tensor",
        lambda comm, plan: with_w1(None),
        Plan.shard,
        "params['blocks'][0]['w1'] (4, 3) torch.float32 expected, found None",
    ),
    (
        "a leaf too few",
        lambda comm, plan: {"blocks": PARAMS["blocks"]},
        Plan.shard,
        "params do not have the structure of the plan:\n  missing params['head']",
    ),
    (
        "a tuple for a list",
        lambda comm, plan: PARAMS | {"blocks": tuple(PARAMS["blocks"])},
        Plan.shard,
        "params do not have the structure of the plan:\n  found ",
    ),
    (
        "a global tensor for a shard",
        shards_with(torch.zeros(5)),
        Plan.full,
        "shards['head']: a shard (2,) of (5,) expected, found (5,); shards come from "
        "plan.shard(params, comm)",
    ),
    (
        "no shard",
        shards_with(None),
        lambda plan, shards, comm: sharded(lambda views: views["head"], plan, comm)(shards),
        "shards['head']: a shard (2,) of (5,) expected, found None",
    ),
    (
        "a leaf too many",
        lambda comm, plan: plan.shard(PARAMS, comm) | {"tail": torch.zeros(2)},
        Plan.full,
        "shards do not have the structure of the plan:\n  unexpected shards['tail']",
    ),
]


@pytest.mark.parametrize(
    ("tree", "use", "message"),
    [r[1:] for r in NOT_OF_THE_PLAN],
    ids=[r[0] for r in NOT_OF_THE_PLAN],
)
def test_a_plan_refuses(tree: Any, use: Any, message: str) -> None:
    plan = make_plan(PARAMS, LABELS, RULES, MESH)
    with pytest.raises(ValueError) as caught:
        simulate(lambda comm: use(plan, tree(comm, plan), comm), MESH)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("use", [Plan.shard, Plan.full])
def test_ranks_of_another_mesh_are_refused(use: Any) -> None:
    plan = make_plan(PARAMS, LABELS, RULES, MESH)
    message = r"plan was made for Mesh\(edp=2, ep=2\), but the ranks form Mesh\(ep=4\)"
    with pytest.raises(ValueError, match=message):
        simulate(lambda comm: use(plan, PARAMS, comm), Mesh(ep=4))
    with pytest.raises(ValueError, match=message):
        simulate(lambda comm: sharded(lambda views: views, plan, comm), Mesh(ep=4))


def test_functions_and_subtrees_that_differ_in_number_are_refused() -> None:
    plan = make_plan([torch.zeros(2)] * 3, ["dense"] * 3, {"dense": zero3("edp", "ep")}, MESH)
    with pytest.raises(ValueError, match="2 functions for a plan of 3 subtrees"):
        simulate(lambda comm: sharded([abs, abs], plan, comm), MESH)
    with pytest.raises(ValueError, match="3 units, but shards for 1"):
        simulate(lambda comm: sharded([abs] * 3, plan, comm)([torch.zeros(1)]), MESH)
    with pytest.raises(ValueError, match=r"backward='forget': choose one of \('keep', 'regather'"):
        simulate(lambda comm: sharded(abs, plan, comm, "forget"), MESH)  # pyright: ignore


def test_two_leaves_of_one_path_are_refused() -> None:
    params = {"a/b": torch.zeros(1), "a": {"b": torch.zeros(1)}}
    labels = {"a/b": "dense", "a": {"b": "dense"}}
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        make_plan(params, labels, {"dense": zero3("edp")}, Mesh(edp=1))


def test_shards_of_another_dtype_are_refused() -> None:
    plan = make_plan({"w": torch.zeros(2)}, {"w": "d"}, {"d": zero3("edp")}, Mesh(edp=1))
    with pytest.raises(
        ValueError, match=r"shards\['w'\]: torch.float32 expected, found torch.bfloat16"
    ):
        simulate(lambda comm: plan.full({"w": torch.zeros(2).bfloat16()}, comm), plan.mesh)
