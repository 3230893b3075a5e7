"""The result of a check, in the four ways in which one ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron.specs.errors import WorkError


@dataclass(frozen=True)
class Check:
    """`max_error` is the largest difference of logits over the largest logit; `exact` says what it was held against."""

    name: str
    passed: bool
    exact: bool
    max_error: float
    tolerance: float
    detail: str

    def __str__(self) -> str:
        if not math.isfinite(self.max_error):
            return f"`{self.name}`: {self.detail}"
        # As many digits as tell the two apart: an error beyond what is allowed must not be shown as less than that.
        digits = next((n for n in (2, 5) if f"{self.max_error:.{n}e}" != f"{self.tolerance:.{n}e}"), 2)
        error, allowed = (f"{value:.{digits}e}" for value in (self.max_error, self.tolerance))
        return f"`{self.name}`: {self.detail} (error {error}, allowed {allowed})"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "exact": self.exact,
            "max_error": self.max_error if math.isfinite(self.max_error) else None,  # JSON has no infinity
            "tolerance": self.tolerance,
            "detail": self.detail,
        }


def exactly(name: str, mistake: str | None, detail: str) -> Check:
    """A comparison without a tolerance: `mistake` is the first difference in words, None where both sides are equal."""
    return Check(name, mistake is None, True, 0.0 if mistake is None else math.inf, 0.0, mistake or detail)


def broken(name: str, error: WorkError) -> Check:
    """A comparison that did not come about because a side of it does not work at all."""
    return exactly(name, str(error), "")


def skipped(name: str, detail: str) -> Check:
    """A comparison that mathematics does not allow here: nothing is claimed."""
    return Check(name, True, False, 0.0, 0.0, detail)


def failed(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]
