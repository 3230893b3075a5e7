"""The block `teacher_correction`: fine-tunes the teacher on the distillation data first."""

from __future__ import annotations

from minitron.specs.blocks.base import Block, Count
from minitron.specs.blocks.training import CorrectionOptimizer


class TeacherCorrection(Block):
    """Fine-tunes the teacher on the distillation data before it teaches (arXiv 2408.11796, "Teacher Correction").

    Data, sequence length, global batch size and seed are those of `distill`.
    """

    tokens: Count
    """The number of tokens to train the teacher on."""

    optimizer: CorrectionOptimizer = CorrectionOptimizer()
    """The optimizer and its schedule."""
