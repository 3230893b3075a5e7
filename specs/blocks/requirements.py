"""The scores that a result must reach, for pipelines: `held_out_loss: "<= 1.05x teacher"`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, WithJsonSchema

from minitron.specs.blocks.base import wrong
from minitron.specs.units import NUMBER_PATTERN

HELD_OUT_LOSS = "held_out_loss"
RECOVERED = "recovered"

_RELATIONS = ("<=", ">=")
_MODELS = ("teacher", "pruned")
_PATTERN = rf"^\s*({'|'.join(_RELATIONS)})\s*({NUMBER_PATTERN})\s*(?:x\s*({'|'.join(_MODELS)}))?\s*$"
_HINT = 'write ">= 0.95x teacher", "<= 1.05x teacher" or a number such as ">= 0.6", in quotes'


@dataclass(frozen=True, slots=True)
class Bound:
    """A lower or upper bound: `number`, multiplied by the score of the model `of` if one is named."""

    relation: str
    number: float
    of: str | None

    def limit(self, reference: float | None) -> float | None:
        """Returns the number that a score is compared to; None if it depends on a missing score."""
        if self.of is None:
            return self.number
        return None if reference is None else self.number * reference

    def shortfall(self, value: float, limit: float) -> float:
        """Returns the distance of `value` from `limit` on the wrong side; 0 on the right side."""
        return max(0.0, limit - value if self.relation == ">=" else value - limit)


def read_bound(text: str) -> Bound | None:
    """Parses a bound; None if `text` is not one."""
    found = re.match(_PATTERN, text)
    return None if found is None else Bound(found[1], float(found[2]), found[3])


def _check(value: Any) -> str:
    if not isinstance(value, str) or read_bound(value) is None:
        raise wrong("{given} is not a bound", _HINT)
    return value


BoundText: TypeAlias = Annotated[
    str,
    BeforeValidator(_check),
    WithJsonSchema({"type": "string", "pattern": _PATTERN, "examples": [">= 0.95x teacher"]}),
]
"""A bound as it is written."""
