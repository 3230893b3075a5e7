"""The block `search`: chooses the student's shape among several."""

from __future__ import annotations

from typing import Literal

from minitron.specs.blocks.base import Block, Bytes, Count, Flops, Fraction, PositiveInt


class Budget(Block):
    """The limits on the student's cost. If several are given, every one of them holds."""

    parameters: Count | None = None
    """Number of parameters, met to within `tolerance`."""

    memory: Bytes | None = None
    """At most this many bytes of weights."""

    flops_per_token: Flops | None = None
    """At most this many floating-point operations for a token."""

    kv_cache: Bytes | None = None
    """At most this many bytes of key-value cache for a token."""

    tolerance: Fraction = 0.05
    """How far the parameters may lie from the budget, either way."""


class Rank(Block):
    """The ranking of candidates: successive halving by short distillation."""

    metric: Literal["kl"] = "kl"
    """What ranks them: the divergence from the teacher on held-out data."""

    tokens: Count = 1_800_000_000
    """Tokens that the longest-lived candidate is distilled on."""

    rungs: PositiveInt = 3
    """How often the field is cut down."""


class Search(Block):
    """Lets `student` values be lists, and finds the best shape among their combinations."""

    budget: Budget
    """What the student may cost."""

    candidates: PositiveInt = 16
    """At most this many enter the first rung: spread over the grid, all within the budget."""

    rank: Rank = Rank()
    """How candidates are ranked."""
