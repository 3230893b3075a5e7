"""The pages and docstrings of the repository: their form, where a machine can check it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator

import pytest

from .conftest import ROOT

WIDTH = 120
# A docstring begins with a verb, or is "The X of Y": these words begin a sentence that has neither.
OPENINGS = {"As", "How", "Of", "Those", "What", "Where", "Whether", "Which", "Why"}


def listed(pattern: str) -> list[str]:
    found = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.split()


def pages() -> list[str]:
    return listed("*.md")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a page without its tables and without code, which is shown as it is printed."""
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    ") and not line.lstrip().startswith("|"):
            yield number, line


@pytest.mark.parametrize("page", pages())
def test_lines_of_prose_fit_a_screen(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    long = [f"{page}:{number}" for number, line in prose(text) if len(line) > WIDTH]
    assert not long, f"wrap these at {WIDTH} characters"


def openings(text: str) -> Iterator[tuple[int, str]]:
    """The line and the first word of every docstring of a module: its own, those of classes, functions and values."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            words = node.value.value.split(maxsplit=1)
            if words:
                yield node.lineno, words[0]


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    sources = [name for name in listed("*.py") if not name.startswith("tests/")]
    assert len(sources) > 400
    wrong = [
        f"{name}:{line} {word}"
        for name in sources
        for line, word in openings((ROOT / name).read_text(encoding="utf-8"))
        if word in OPENINGS
    ]
    assert not wrong
