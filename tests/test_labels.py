"""Labels by pattern: what is trained and what is frozen, and patterns that match nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optree import tree_map

from functional_ep import freeze, label_by_path, train_only
from functional_ep.labels import Selection
from sharding import expert_parallel, zero3
from sharding.tree import flatten

RULES = {"dense": zero3("edp", "ep"), "expert": expert_parallel("ep"), "idle": zero3("ep")}
PATHS = ("norm", "gate", "experts/up", "experts/down")
PATTERNS = ("*", "gate", "experts/*", "*o*", "*/up")


@st.composite
def labelled(draw: st.DrawFn) -> dict[str, str]:
    paths = draw(st.lists(st.sampled_from(PATHS), min_size=1, unique=True))
    return {path: draw(st.sampled_from(["dense", "expert"])) for path in paths}


@given(labelled(), st.sampled_from(PATTERNS))
def test_what_one_trains_the_other_freezes_and_no_rule_changes(
    labels: dict[str, str], pattern: str
) -> None:
    try:
        trained = label_by_path({pattern: "yes"}, default="no")(labels)
    except ValueError:
        for select in (train_only, freeze):
            with pytest.raises(ValueError, match="matches no leaf"):
                select(labels, RULES, pattern)
        return
    for select, frozen_if in ((train_only, "no"), (freeze, "yes")):
        found = select(labels, RULES, pattern)
        for path, label in labels.items():
            new = found.labels[path]
            assert (new in found.frozen) == (trained[path] == frozen_if)
            assert found.rules[new] == RULES[label]
        assert set(found.rules) == set(found.labels.values()), "a rule without a leaf is refused"


@given(labelled(), st.data())
def test_what_is_frozen_stays_so(labels: dict[str, str], data: st.DataObject) -> None:
    first = data.draw(st.sampled_from(sorted(labels)))
    second = data.draw(st.sampled_from(sorted(labels)))
    one = train_only(labels, RULES, first)
    two = freeze(one.labels, one.rules, second)
    for path, label in labels.items():
        trained = path == first != second
        assert (two.labels[path] in two.frozen) != trained
        assert two.rules[two.labels[path]] == RULES[label]


def test_what_is_no_tree_of_labels_or_no_pattern_is_refused() -> None:
    by_path: Any = label_by_path({}, default="dense")
    with pytest.raises(TypeError, match=r"give the labels that it makes, labels\(params\)"):
        train_only(by_path, RULES, "*")
    patterns: Any = ["gate"]
    with pytest.raises(TypeError, match=r"not \['gate'\]: unpack it"):
        train_only({"gate": "dense"}, RULES, patterns)


def test_trees_keep_their_structure() -> None:
    labels: Any = {"blocks": [{"w": "dense"}, {"w": "dense"}]}
    found: Selection = train_only(labels, RULES, "blocks/1/*")
    assert flatten(found.labels)[1] == flatten(tree_map(str, labels))[1]
    assert found.labels == {"blocks": [{"w": "dense, frozen"}, {"w": "dense"}]}


def test_a_pattern_that_matches_nothing_names_paths_that_are_near() -> None:
    labels = {"model.layers.0.mlp.gate.weight": "dense"}
    with pytest.raises(ValueError, match=r"'\*\.gates\.\*' matches no leaf; .*mlp\.gate\.weight"):
        train_only(labels, RULES, "*.gates.*")
