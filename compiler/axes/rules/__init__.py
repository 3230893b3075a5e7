"""One file of op rules per kind of operator; importing this package fills the table."""

from minitron.compiler.axes.rules import attention, contract, elementwise, experts, factory, index, reduce, shape
from minitron.compiler.axes.rules.registry import POSITIONS, RULES, Rule, rule

__all__ = [
    "POSITIONS",
    "RULES",
    "Rule",
    "attention",
    "contract",
    "elementwise",
    "experts",
    "factory",
    "index",
    "reduce",
    "rule",
    "shape",
]
