"""The known bugs of expert-parallel training, planted one by one: each must be killed.

One law, "a training is that of plain torch" (T6, which holds T1, T2, T4 and T7 in one), kills all;
beside each bug stands the narrow law that says where it is.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from laws import even, is_that_of_plain_torch
from mutants import MUTANTS, Mutant

from functional_ep.testing import Training, trainings

EXAMPLES = 60


def examples_until_killed() -> int | None:
    """How many random trainings it took to refute the law, or None if none did."""
    tried = 0

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(trainings())
    def attempt(case: Training) -> None:
        nonlocal tried
        tried += 1
        is_that_of_plain_torch(case)

    try:
        attempt()
    except Exception:
        return tried
    return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_one_law_kills(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.plant(monkeypatch)
    tried = examples_until_killed()
    assert tried is not None, f"{mutant.name} survives {EXAMPLES} random trainings"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_narrow_law_localises(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.narrow()  # holds
    mutant.plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 -- an assertion, or the error that the bug leads to
        mutant.narrow()


def test_a_fixed_parity_test_misses_most() -> None:
    """Why properties: two ranks, ep=2, even tokens and one step of Adam see few of these bugs."""
    missed: list[str] = []
    for mutant in MUTANTS:
        with pytest.MonkeyPatch.context() as patch:
            mutant.plant(patch)
            try:
                is_that_of_plain_torch(even())
            except Exception:
                continue
            missed.append(mutant.name)
    assert len(missed) >= 5, f"the fixed test misses only {missed}"
