"""The block `search`: chooses the student's shape, its learning rate and its batch size among several."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from minitron.specs.blocks.base import Block, Bytes, Count, Flops, Fraction, PositiveFloat, PositiveInt, Text

# Where the spec does not say, the rungs take at most this share of the distillation's tokens: after a quarter of them the
# candidates' order correlated with the final one by 0.7 to 0.9 in our trials (docs/search.md).
RUNG_SHARE = 0.25
# Each rung is twice as long as the one before it: the first of more than these would be nothing beside the last.
MOST_RUNGS = 20


class Workload(Block):
    """A use of the student on a device: weights and key-value cache must fit its memory, and with `milliseconds_per_token`
    its speed is limited too. The speed is an estimate from the device's bandwidth and peak."""

    input: Count
    """Tokens of a prompt."""

    output: Count
    """Tokens that are generated."""

    concurrency: PositiveInt = 1
    """Requests that are answered at the same time."""

    device: Text
    """A device that `minitron plan --device` knows, such as h100."""

    milliseconds_per_token: PositiveFloat | None = None
    """At most this long for a token of each request."""


class Budget(Block):
    """The limits on the student's cost. If several are given, every one of them holds."""

    parameters: Count | None = None
    """Number of parameters, met to within `tolerance`."""

    active_parameters: Count | None = None
    """At most this many parameters that a token meets."""

    memory: Bytes | None = None
    """At most this many bytes of weights."""

    flops_per_token: Flops | None = None
    """At most this many floating-point operations for a token."""

    kv_cache: Bytes | None = None
    """At most this many bytes of key-value cache for a token."""

    workload: Workload | None = None
    """The use of the student that decides its width and depth."""

    tolerance: Fraction = 0.05
    """The largest distance of the parameters from the budget, either way, as a share of it."""


LIMITS = ("parameters", "active_parameters", "memory", "flops_per_token", "kv_cache", "workload")
"""The keys of a budget that limit something."""


class Rank(Block):
    """The ranking of candidates: successive halving by short distillation."""

    metric: Literal["kl"] = "kl"
    """The measure that ranks them: the divergence from the teacher on held-out data."""

    tokens: Count = 1_800_000_000
    """Tokens that the longest-lived candidate is distilled on. Left out: 1.8B, and at most a quarter of `distill.tokens`."""

    rungs: Annotated[PositiveInt, Field(le=MOST_RUNGS)] = 3
    """The number of times that the field is cut down, to one candidate at last."""


class Search(Block):
    """Finds the best student among several: shapes within a budget, learning rates, batch sizes. `student` values may then be
    lists or ranges; without any, the compiler proposes shapes within the budget."""

    budget: Budget | None = None
    """The cost that the student may have; needed where its shape is searched."""

    candidates: PositiveInt = 16
    """At most this many enter the first rung: spread over the grid, all within the budget."""

    rank: Rank = Rank()
    """The ranking of the candidates."""
