"""The choice of what is recomputed and of the micro batch where a spec leaves them open: the least recomputation, and
with it the largest micro batch, whose memory fits a device of 80 GB, alone or, where nothing fits one, among eight.

The choice follows from the spec and not from the machine that compiles: the same spec gives the same training.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minitron.compiler.estimate.devices import REFERENCE
from minitron.compiler.estimate.memory import Layout
from minitron.specs.blocks.distill import Recomputation
from minitron.specs.training_plan import divisor_within

WAYS: tuple[Recomputation, ...] = (False, "attention", True)
"""The kinds of recomputation, the least first."""

MACHINES = (1, 8)
"""The devices that a training is tried on: one, and those of a machine."""

LEAST_TOKENS = 2048
"""Tokens of a forward below which products of matrices no longer keep a device busy: a smaller micro batch is worse than
recomputation."""


@dataclass(frozen=True)
class Choice:
    """The recomputation in the backward pass, and the most sequences in one forward."""

    recompute: Recomputation
    micro_batch: int


def choose(
    ways: Sequence[Recomputation],
    sizes: Sequence[int],
    layout: Callable[[int, Choice], Layout],
    peak: Callable[[Layout], int],
    least: Callable[[Layout], int],
    machines: Sequence[int] = MACHINES,
) -> Choice:
    """Returns the first choice that fits: `ways` by `sizes`, both in order of preference; the last of `ways` with the first
    of `sizes` where none does. `layout` makes the layout for a number of devices, each of `machines` in turn; `peak` is its
    memory, and `least` a lower bound of that which costs nothing."""
    tried = [Choice(way, size) for way in ways for size in sizes]
    for devices in machines:
        for choice in tried:
            laid = layout(devices, choice)
            if least(laid) <= REFERENCE.memory_bytes and peak(laid) <= REFERENCE.memory_bytes:
                return choice
    return Choice(ways[-1], sizes[0])


def micro_batches(global_batch: int, length: int, most: int) -> Iterator[int]:
    """Yields the micro batches to try, from `most` down to what keeps a device busy."""
    size = most
    while True:
        yield size
        if size == 1 or divisor_within(global_batch, size // 2) * length < LEAST_TOKENS:
            return
        size = divisor_within(global_batch, size // 2)
