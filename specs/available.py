"""Lists what the language can express and this version cannot do yet."""

from __future__ import annotations

from collections.abc import Iterator

from minitron.specs.errors import Problem
from minitron.specs.spec import Spec


def unavailable(spec: Spec) -> list[Problem]:
    """Returns a problem for each part of `spec` that this version cannot do."""
    return list(_unavailable(spec))


def _unavailable(spec: Spec) -> Iterator[Problem]:
    if spec.search is not None:
        yield _missing("search", "search", "leave it out and write one value for each width")


def _missing(path: str, what: str, instead: str) -> Problem:
    return Problem(path, f"{what} is not available in this version", instead)
