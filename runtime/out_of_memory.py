"""What a user is told where a device has no room for a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minitron.specs.errors import WorkError
from minitron.specs.training_plan import TrainingPlan


@contextmanager
def told_in_a_sentence(plan: TrainingPlan) -> Iterator[None]:
    """WorkError, with what of the plan takes less memory, where torch finds none. `plan` has the micro batch of a rank."""
    try:
        yield
    except torch.OutOfMemoryError:
        held = f"a micro batch of {plan.micro_batch_size} x {plan.sequence_length} tokens"
        ways = list(_ways(plan))
        raise WorkError(
            f"the device has no memory left for {held}; write {', or '.join(ways)} in training.yaml"
        ) from None


def _ways(plan: TrainingPlan) -> Iterator[str]:
    """Changes that take less memory, those first that a training which is under way may make."""
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
