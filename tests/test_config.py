"""Recipes: text and back again is the identity, and a wrong word is answered with the right one."""

import tomllib
from dataclasses import dataclass, field, replace
from math import inf, nan
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_ep import config
from functional_ep.config import Recipe
from functional_ep.lm import Config


@dataclass(frozen=True)
class Engine:
    power: int = 3
    name: str = "v"
    loud: bool = False


@dataclass(frozen=True)
class Car:
    engine: Engine = field(default_factory=Engine)
    weight: float = 1.5
    fuel: Literal["gas", "sun"] = "sun"


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
ENGINES = st.builds(Engine, power=st.integers(-(2**60), 2**60), name=TEXT, loud=st.booleans())
CARS = st.builds(
    Car, engine=ENGINES, weight=st.floats(allow_nan=False), fuel=st.sampled_from(["gas", "sun"])
)


@given(car=CARS, start=CARS)
def test_load_after_dumps_is_the_identity(car: Car, start: Car) -> None:
    assert config.merge(start, tomllib.loads(config.dumps(car)), where="") == car


def test_a_recipe_survives_a_file(tmp_path: Path) -> None:
    recipe = Recipe(steps=7, lr=1e-5, clip=inf, precision="bf16")
    recipe = replace(recipe, model=replace(recipe.model, layers=2))
    (tmp_path / "recipe.toml").write_text(config.dumps(recipe), encoding="utf-8")
    assert recipe != Recipe()
    assert config.load(Recipe(), tmp_path / "recipe.toml") == recipe


@given(car=CARS)
def test_an_assignment_changes_one_field(car: Car) -> None:
    assert config.assign(car, "engine.power=-4") == replace(
        car, engine=replace(car.engine, power=-4)
    )
    assert config.assign(car, "engine.loud = true").engine.loud is True
    assert config.assign(car, "engine.name=a=b c").engine.name == "a=b c"
    assert config.assign(car, 'engine.name="12"').engine.name == "12"
    assert config.assign(car, "weight=2") == replace(car, weight=2.0)
    assert type(config.assign(car, "weight=2").weight) is float
    assert config.assign(car, "weight=inf").weight == inf
    assert config.assign(car, "fuel=gas") == replace(car, fuel="gas")


REFUSED: list[tuple[str, type[Exception], str]] = [
    (
        "engine.pwer=2",
        ValueError,
        "unknown key 'engine.pwer' (--set engine.pwer=2); did you mean 'engine.power'? "
        "known keys: engine.power, engine.name, engine.loud",
    ),
    (
        "zzz=2",
        ValueError,
        "unknown key 'zzz' (--set zzz=2); known keys: engine, weight, fuel",
    ),
    (
        "engine.power=2.5",
        TypeError,
        "engine.power = 2.5 (--set engine.power=2.5): found float, expected int",
    ),
    (
        "engine.power=true",
        TypeError,
        "engine.power = True (--set engine.power=true): found bool, expected int",
    ),
    (
        "weight=heavy",
        TypeError,
        "weight = 'heavy' (--set weight=heavy): found str, expected float",
    ),
    (
        "engine.loud=1",
        TypeError,
        "engine.loud = 1 (--set engine.loud=1): found int, expected bool (true or false)",
    ),
    (
        "engine=v8",
        TypeError,
        "engine = 'v8' (--set engine=v8): found str, expected a table of power, name, loud",
    ),
    (
        "weight.kg=2",
        TypeError,
        "weight = {'kg': 2} (--set weight.kg=2): found dict, expected float",
    ),
    (
        "fuel=coal",
        ValueError,
        "fuel = 'coal' (--set fuel=coal): expected one of 'gas', 'sun'",
    ),
    (
        "weight",
        ValueError,
        "--set weight: not an assignment; write --set key=value, as in --set lr=1e-3",
    ),
]


@pytest.mark.parametrize(("assignment", "kind", "message"), REFUSED)
def test_what_is_wrong_is_said(assignment: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        config.assign(Car(), assignment)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"eval_bytes": 1}, "eval_bytes = 1: must be at least 2"),
        ({"seed": -1}, "seed = -1: must be at least 0"),
        ({"seed": 2**63}, "seed = 9223372036854775808: must be less than 2**63"),
        ({"lr": -1.0}, "lr = -1.0: must be at least 0, and finite"),
        ({"lr": nan}, "lr = nan: must be at least 0, and finite"),
        ({"weight_decay": inf}, "weight_decay = inf: must be at least 0, and finite"),
        ({"clip": 0.0}, "clip = 0.0: must be positive; inf does not clip"),
        ({"clip": nan}, "clip = nan: must be positive; inf does not clip"),
        ({"model": Config(vocab=64)}, "model.vocab = 64: texts are bytes, so it is 256"),
        ({"warmup": 1.0}, "warmup = 1.0: a share of the steps, from 0 to less than 1"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Recipe(**changes)
    assert str(error.value) == message


def test_the_largest_seed_is_one_of_torch() -> None:
    assert torch.Generator().manual_seed(Recipe(seed=2**63 - 1).seed).initial_seed() == 2**63 - 1


def test_a_value_out_of_range_is_said_to_come_from_its_place() -> None:
    with pytest.raises(ValueError) as error:
        config.assign(Recipe(), "steps=0")
    assert str(error.value) == "--set steps=0: steps = 0: must be at least 1"


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "car.toml").write_text("weight = 3", encoding="utf-8-sig")
    assert config.load(Car(), tmp_path / "car.toml").weight == 3.0


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        config.load(Car(), tmp_path / "no.toml")
    assert str(error.value) == (
        f"cannot read --config {tmp_path}/no.toml: No such file or directory; "
        "give an existing TOML file"
    )
    (tmp_path / "bad.toml").write_text("weight 3")
    with pytest.raises(ValueError) as error:
        config.load(Car(), tmp_path / "bad.toml")
    assert str(error.value).startswith(f"--config {tmp_path}/bad.toml is not TOML: Expected '='")
    (tmp_path / "odd.toml").write_text("[engine]\npowre = 3")
    with pytest.raises(ValueError) as error:
        config.load(Car(), tmp_path / "odd.toml")
    assert "unknown key 'engine.powre' (--config" in str(error.value)
