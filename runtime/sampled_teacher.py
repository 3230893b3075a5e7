"""Stored samples in place of a teacher: the identity that they must have been drawn for, and its check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.runtime.identity import WEIGHTS, weights_digest
from minitron.runtime.plan import LoadedPlan
from minitron.runtime.teacher_logits import StoredLogits, changes, read_index
from minitron.specs.blocks.distill import SampledLogits
from minitron.specs.builds import CONFIG, LOGITS
from minitron.specs.errors import Problem, Refused, UsageError
from minitron.specs.training_plan import TrainingPlan

_KEPT = (
    "data", "seed", "shuffle", "sequence_length", "teacher_logits.sampled", "loss.logits.temperature",
    "teacher.dtype", "teacher.compute", "teacher.head.", "teacher_correction.",
)  # fmt: skip


def samples_identity(training: Mapping[str, Any], teacher: Path | None) -> dict[str, Any]:
    """Returns everything that decides the samples, flat, from everything that decides the training (`resume_identity`);
    `teacher` is the folder of the teacher's weights, where it exists. The number of training tokens and the batch sizes
    are left out: a longer training has the same samples and more.
    """
    kept = {key: value for key, value in training.items() if key.startswith(_KEPT)}
    return kept if teacher is None else kept | {WEIGHTS: weights_digest(teacher)}


def stored_logits(loaded: LoadedPlan, training: Mapping[str, Any]) -> StoredLogits:
    """Opens the samples that the plan trains from. The teacher itself need not exist; where it does, the samples must
    be drawn from it.

    UsageError where samples are missing; Refused where they were drawn for another training.
    """
    plan = loaded.training()
    assert isinstance(plan.teacher_logits, SampledLogits)
    folder, again = loaded.folder / LOGITS, f"run: minitron capture {loaded.folder}"
    index = read_index(folder)
    if index is None:
        raise UsageError(
            f"{loaded.folder} has no stored teacher logits, and `teacher_logits: {{sampled: ...}}` trains from them; {again}"
        )
    wanted = samples_identity(training, _teacher_at_hand(loaded, plan))
    stored = {key: value for key, value in index.identity.items() if key != WEIGHTS or key in wanted}
    if different := changes(stored, wanted):
        message = f"the stored samples in {folder} were drawn with other settings ({', '.join(different)})"
        raise Refused([Problem("teacher_logits", message, f"bring these back, or {again}")])
    if index.samples < (needed := samples_needed(plan)):
        raise UsageError(f"{folder} holds {index.samples} of {needed} sequences; {again}, which adds what is missing")
    return StoredLogits(folder, index, plan.teacher_logits.sampled)


def samples_needed(plan: TrainingPlan) -> int:
    """Returns the number of global samples that a whole training reads."""
    return plan.steps * plan.global_batch_size


def _teacher_at_hand(loaded: LoadedPlan, plan: TrainingPlan) -> Path | None:
    model = plan.teacher.model if plan.teacher_correction is None else plan.teacher_correction.output
    folder = loaded.folder / model
    return folder if (folder / CONFIG).is_file() else None
