"""The table of op rules: what each operator says about the dimensions of its operands.

A rule is a function of the tracer and a node. It unifies, pins or notes dimensions, and returns the dimensions of the
result: a list of `Dim`, one a dimension; for operators with several results, a list of such lists. Registering it is one
decorator. An operator without a rule pins everything that it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from minitron.compiler.dims import Dim

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

Dims = list[Dim]
Result = Dims | list[Dims]
Rule = Callable[["Tracer", torch.fx.Node], Result]

RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of these operators (overloads, or packets for all their overloads)."""

    def register(function: Rule) -> Rule:
        for target in targets:
            if isinstance(target, torch._ops.OpOverloadPacket):
                for name in target.overloads():  # type: ignore[no-untyped-call]
                    RULES[getattr(target, name)] = function
            else:
                RULES[target] = function
        return function

    return register


def axis_index(dim: int, rank: int) -> int:
    """A dimension number as counted from the front."""
    return dim % rank if rank else 0
