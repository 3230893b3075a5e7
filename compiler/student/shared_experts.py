"""Shared experts whose width has no key of its own: a multiple of a routed expert's width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron.compiler.roles.names import INTERMEDIATE, MOE_INTERMEDIATE, SHARED
from minitron.compiler.student.config_keys import config_key

UNITS = (MOE_INTERMEDIATE, INTERMEDIATE)
# Keys that say how many experts' widths the shared one has.
COUNT_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")


@dataclass(frozen=True)
class Tie:
    """The shared expert is `times` as wide as the axis `unit`; `key` says so in the configuration, or it is always so."""

    unit: str
    times: int
    key: str | None


def find_tie(config: Any, teacher: Mapping[str, int]) -> Tie | None:
    """Finds the width that the shared expert's width is tied to, where it has no key of its own. `teacher`: axis ->
    width."""
    if SHARED not in teacher or config_key(config, SHARED, teacher[SHARED]) is not None:
        return None
    for unit in UNITS:
        times, rest = divmod(teacher[SHARED], teacher[unit]) if unit in teacher else (0, 1)
        if rest:
            continue
        key = next((key for key in COUNT_KEYS if getattr(config, key, None) == times), None)
        if key is not None or times == 1:
            return Tie(unit, times, key)
    return None
