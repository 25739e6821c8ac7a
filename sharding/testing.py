"""Laws of sharding rules as functions, for rules of one's own and for changes to this library.

``check_rule(rule)`` checks all of them on random meshes and shapes. Each law is also a function of
one :class:`Case`; it takes the functions under test as an argument, so that a wrong one can be
planted: ``counterexample(law, functions)`` proves that the law rejects it.
"""

from __future__ import annotations

from hypothesis import find, given, settings

from .laws import (
    LAWS,
    LIBRARY,
    Functions,
    Law,
    check_accounting,
    check_adjoint,
    check_isolation,
    check_purity,
    check_round_trip,
    check_tiling,
    check_view,
)
from .recording import Event, Recording, check_symmetry
from .rule import Rule
from .strategies import (
    Case,
    axes_of,
    cases,
    exact,
    exact_params,
    meshes,
    plans,
    rules,
    seeds,
    shapes,
)

__all__ = [
    "LAWS",
    "Case",
    "Event",
    "Functions",
    "Law",
    "Recording",
    "axes_of",
    "cases",
    "check_accounting",
    "check_adjoint",
    "check_isolation",
    "check_purity",
    "check_round_trip",
    "check_rule",
    "check_symmetry",
    "check_tiling",
    "check_view",
    "counterexample",
    "exact",
    "exact_params",
    "meshes",
    "plans",
    "rules",
    "seeds",
    "shapes",
]


def check_rule(
    rule: Rule, *, max_examples: int | None = None, functions: Functions = LIBRARY
) -> None:
    """Every law of rules (L1-L4, L7-L9) holds for ``rule``, on random meshes with its axes.

    Args:
        rule: any axis names do.
        max_examples: how many meshes and shapes; by default as many as hypothesis is set to.
        functions: what moves the leaves, if not the library's own functions.

    >>> check_rule(Rule(compute=("experts",), store=("replicas",)), max_examples=10)
    """
    examples = settings.default if max_examples is None else settings(max_examples=max_examples)

    @settings(examples, deadline=None, report_multiple_bugs=False)
    @given(cases(rule=rule))
    def laws(case: Case) -> None:
        for law in LAWS:
            law(case, functions)

    laws()


def counterexample(law: Law, functions: Functions) -> Case:
    """The simplest case that breaks a law; ``hypothesis.errors.NoSuchExample`` if there is none.

    >>> empty = Functions(interval=lambda rule, mesh, rank, shape: (0, 0))
    >>> counterexample(check_tiling, empty).mesh
    Mesh()
    """

    def breaks(case: Case) -> bool:
        try:
            law(case, functions)
        except AssertionError:
            return True
        return False

    search = settings(max_examples=2000, deadline=None, database=None, derandomize=True)
    return find(cases(), breaks, settings=search)
