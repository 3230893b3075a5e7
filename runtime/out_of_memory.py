"""The error message for a device that has too little memory for a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minitron.runtime.course import Course, Stretch
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
        widest = max(Course.of(plan).stretches, key=lambda one: one.phase.micro_batch_size * one.phase.sequence_length)
        raise in_a_sentence(plan, widest) from None


def in_a_sentence(plan: TrainingPlan, stretch: Stretch, tried: str | None = None) -> WorkError:
    """Returns the error for a phase whose micro batch does not fit. `tried` is a change that was found to fit; without one
    the changes are named that take less memory.
    """
    phase = stretch.phase
    held = f"a micro batch of {phase.micro_batch_size} x {phase.sequence_length} tokens"
    if tried is not None:
        return WorkError(
            f"the device has no memory left for {held}; write {tried} in training.yaml, which was tried and fits"
        )
    ways = list(_ways(plan, stretch))
    return WorkError(f"the device has no memory left for {held}; write {', or '.join(ways)} in training.yaml")


def _ways(plan: TrainingPlan, stretch: Stretch) -> Iterator[str]:
    """Yields changes that take less memory, first those that are allowed in a training that has already begun."""
    at = f"phases.{stretch.number}." if plan.phases else ""
    if stretch.phase.micro_batch_size > 1:
        yield f"`{at}micro_batch_size: {stretch.phase.micro_batch_size // 2}`"
    if plan.gradient_checkpointing is not True:
        yield "`gradient_checkpointing: true`"
    narrow = [
        setting
        for setting, used in (
            ("`weights: bfloat16`", plan.weights == "bfloat16"),
            ("`optimizer.states: int8`", plan.optimizer.states == "int8"),
        )
        if not used
    ]
    if not plan.layout.cpu_offload and len(narrow) == 2:  # narrow weights and moments are updated on the device
        yield "`layout.cpu_offload: true` with `layout.student: sharded`"
    if narrow:
        yield f"begin again with {' and '.join(narrow)}"
    yield f"a shorter `{at}sequence_length`"
