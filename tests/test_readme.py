"""The README and the recipes are run: a ``python`` block prints the ``text`` block directly below.

Each block runs by itself. In a ``text`` block ``...`` stands for anything, and a number with a
decimal point for every number within a thousandth of it. ``sh`` blocks name targets that the
Makefile has. There is no other kind.
"""

from __future__ import annotations

import re
from math import isclose
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = ("README.md", "docs/recipes.md")
NUMBER = r"[-+]?\d+\.\d*(?:e[-+]?\d+)?"


class Block(NamedTuple):
    """A fenced block: the line it begins in, its language, and what it holds."""

    line: int
    language: str
    text: str


class Example(NamedTuple):
    """A program and, where a ``text`` block directly follows it, what it prints."""

    line: int
    program: str
    output: str | None


def blocks(markdown: str) -> list[Block]:
    found: list[Block] = []
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", markdown, re.M):
        found.append(Block(markdown[: match.start()].count("\n") + 2, match[1], match[2]))
    assert markdown.count("```") == 2 * len(found), "a fence that does not stand by itself"
    wrong = [block for block in found if block.language not in ("python", "text", "sh")]
    assert not wrong, f"a block that nobody would check: {wrong}"
    return found


def examples(markdown: str) -> list[Example]:
    found = blocks(markdown)
    made: list[Example] = []
    texts = {block.line: block.text for block in found if block.language == "text"}
    for block in found:
        if block.language == "python":
            below = block.line + block.text.count("\n") + 2  # past the two fences, or a blank line
            output = texts.get(below, texts.get(below + 1))
            made.append(Example(block.line, block.text, output))
    assert made, "the page shows no program"
    return made


def agrees(printed: str, expected: str) -> bool:
    """Whether a program printed what the README says, by the convention above.

    >>> agrees("loss 2.1996, norm 7\\n", "loss 2.2, norm 7\\n")
    True
    """
    parts = re.split(rf"(\.\.\.|{NUMBER})", expected.strip())
    pattern = [re.escape(text) for text in parts]
    pattern[1::2] = [r".*?" if part == "..." else f"({NUMBER})" for part in parts[1::2]]
    match = re.fullmatch("".join(pattern), printed.strip(), re.S)
    numbers = [part for part in parts[1::2] if part != "..."]
    return match is not None and all(
        isclose(float(found), float(number), rel_tol=1e-3)
        for found, number in zip(match.groups(), numbers, strict=True)
    )


PROGRAMS = [
    pytest.param(page, example, id=f"{page} line {example.line}")
    for page in PAGES
    for example in examples((ROOT / page).read_text("utf-8"))
]


@pytest.mark.parametrize(("page", "example"), PROGRAMS)
def test_a_program_prints_what_the_page_says(
    page: str, example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    padding = "\n" * (example.line - 1)  # so that a traceback names the line of the page
    exec(compile(padding + example.program, ROOT / page, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    if example.output is not None:
        assert agrees(printed, example.output), f"printed:\n{printed}"


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    shell = "\n".join(block.text for block in blocks(README) if block.language == "sh")
    named = set(re.findall(r"^make ([a-z]+)", shell, re.M))
    assert "test" in named, "the README does not say how the tests are run"
    assert named <= set(re.findall(r"^([a-z]+):", makefile, re.M))


# -- the checks themselves -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("loss 2.3", "loss 2.2"),
        ("loss 2.2", "los 2.2"),
        ("loss 2.2 and more", "loss 2.2"),
        ("7", "8"),
        ("tensor([1.0, 2.0])", "tensor([1.0, -2.0])"),
        ("", "loss ..."),
    ],
)
def test_another_output_is_found(printed: str, expected: str) -> None:
    assert not agrees(printed, expected)


def test_an_output_belongs_to_the_program_directly_before_it() -> None:
    after, apart = "```text\n1\n```\n", "\nWords.\n\n```text\n2\n```\n"
    first, second = examples(f"# Title\n\n```python\na\n```\n{after}\n```python\nb\n```\n{apart}")
    assert first == Example(4, "a\n", "1\n")
    assert second == Example(11, "b\n", None)


@pytest.mark.parametrize(
    "markdown",
    ["# Title\n", "```sh\nmake test\n```\n", "```py\nprint(1)\n```\n", "```python\nprint(1)\n"],
)
def test_a_readme_without_a_program_that_runs_is_refused(markdown: str) -> None:
    with pytest.raises(AssertionError):
        examples(markdown)
