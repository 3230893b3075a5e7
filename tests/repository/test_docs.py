"""The pages of the repository are read in editors and terminals too."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from .conftest import ROOT

WIDTH = 120


def pages() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


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
