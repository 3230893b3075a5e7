"""Tiny models of every family, captured and analysed once in a session."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from minitron.compiler.axes import AxisTable, analyse
from minitron.compiler.capture import Captured, capture
from minitron.compiler.roles import Roles, find_roles
from tests.models import FAMILIES, tiny_config

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox")
ALL = tuple(FAMILIES)


@dataclass(frozen=True)
class Analysed:
    captured: Captured
    table: AxisTable
    roles: Roles

    def describe(self, parameter: str) -> list[str]:
        """The dimensions of a parameter in words."""
        return [self.table.space.describe(dim) for dim in self.table.parameters[parameter]]


@functools.cache
def analysed(family: str, **changes: Any) -> Analysed:
    """`changes` replace keys of the configuration. Two layers are as good as four here."""
    captured = capture(tiny_config(family, **{"num_hidden_layers": 2, **changes}))
    table = analyse(captured)
    return Analysed(captured, table, find_roles(captured, table))
