"""Lists what the language can express and this version cannot do yet."""

from __future__ import annotations

from minitron.specs.errors import Problem
from minitron.specs.spec import Spec


def unavailable(spec: Spec) -> list[Problem]:
    """Returns a problem for each part of `spec` that this version cannot do: there is none at present."""
    return []
