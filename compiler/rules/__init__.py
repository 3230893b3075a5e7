"""One file of op rules per kind of operator; importing this package fills the table."""

from minitron.compiler.rules import attention, contract, elementwise, experts, factory, index, reduce, shape
from minitron.compiler.rules.registry import POSITIONS, RULES, Dims, Result, Rule, rule

__all__ = [
    "POSITIONS",
    "RULES",
    "Dims",
    "Result",
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
