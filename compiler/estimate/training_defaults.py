"""The values of a training plan that a spec leaves open."""

from __future__ import annotations

from typing import Literal

from minitron.specs.training_plan import divisor_within

MICRO_BATCH_TOKENS = 8192  # tokens of one forward pass where the spec leaves the micro batch open
REPLICATED_TEACHER_BYTES = 32 * 2**30  # a teacher up to this size stands whole on each device: 12B in bf16, of 80 GB
CHECKPOINTS = 20  # over the whole training, where the spec leaves it open

MEASURED_TOKENS = 2  # held-out tokens for each one that is trained: a forward of the student beside five of both models


def measure_every(checkpoint: int, held_out: int) -> int:
    """Returns the tokens between two measurements of `held_out` tokens: as many whole intervals of checkpoints as it takes
    for measuring to cost less than training."""
    return checkpoint * max(1, -(-held_out // (MEASURED_TOKENS * checkpoint)))


def place_teacher(weight_bytes: int) -> Literal["sharded", "replicated"]:
    """Replicates the teacher on each device while that leaves room for the student, else shards it."""
    return "replicated" if weight_bytes <= REPLICATED_TEACHER_BYTES else "sharded"


def micro_batch(global_batch: int, length: int) -> int:
    """The largest divisor of the global batch whose tokens stay within MICRO_BATCH_TOKENS, at least 1."""
    return divisor_within(global_batch, max(1, MICRO_BATCH_TOKENS // length))
