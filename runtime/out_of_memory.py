"""The error message for a device that has too little memory for a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minitron.specs.errors import WorkError
from minitron.specs.training_plan import TrainingPlan


@contextmanager
def told_in_a_sentence(plan: TrainingPlan) -> Iterator[None]:
    """Turns torch's out-of-memory error into a WorkError that names the changes of the plan that take less memory.
    `plan` has the micro batch of a rank.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        held = f"a micro batch of {plan.micro_batch_size} x {plan.sequence_length} tokens"
        ways = list(_ways(plan))
        raise WorkError(
            f"the device has no memory left for {held}; write {', or '.join(ways)} in training.yaml"
        ) from None


def _ways(plan: TrainingPlan) -> Iterator[str]:
    """Yields changes that take less memory, first those that are allowed in a training that has already begun."""
    if plan.micro_batch_size > 1:
        yield f"`micro_batch_size: {plan.micro_batch_size // 2}`"
    if not plan.gradient_checkpointing:
        yield "`gradient_checkpointing: true`"
    if not plan.layout.cpu_offload:
        yield "`layout.cpu_offload: true` with `layout.student: sharded`"
    narrow = [
        setting
        for setting, used in (
            ("`weights: bfloat16`", plan.weights == "bfloat16"),
            ("`optimizer.states: int8`", plan.optimizer.states == "int8"),
        )
        if not used
    ]
    if narrow:
        yield f"begin again with {' and '.join(narrow)}"
    yield "a shorter `sequence_length`"
