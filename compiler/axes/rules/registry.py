"""The table of op rules: what each operator says about the dimensions of its operands.

A rule is a function of the tracer and a node. It unifies, pins or notes dimensions, and returns the dimensions of the
result: a list of `Dim`, one a dimension; for operators with several results, a list of such lists. Registering it is one
decorator. An operator without a rule pins everything that it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from minitron.compiler.axes.dims import Result
from minitron.compiler.axes.tracer import Tracer

Rule = Callable[[Tracer, torch.fx.Node], Result]

RULES: dict[Any, Rule] = {}

# How an operator treats an operand whose values are positions (see `compiler.axes.index_meaning`):
#     same   the result holds the same values, in whatever order and shape
#     some   it holds some of them, or some of them several times
#     own    its rule knows
# All other operators read numbers.
Treatment = Literal["same", "some", "own"]

POSITIONS: dict[Any, Treatment] = {}


def rule(*targets: Any, positions: Treatment | None = None) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of these operators (overloads, or packets for all their overloads)."""

    def register(function: Rule) -> Rule:
        for target in targets:
            if isinstance(target, torch._ops.OpOverloadPacket):
                names = target.overloads()  # type: ignore[no-untyped-call]
                overloads = [getattr(target, name) for name in names]
            else:
                overloads = [target]
            for overload in overloads:
                RULES[overload] = function
                if positions is not None:
                    POSITIONS[overload] = positions
        return function

    return register
