"""The model of a whole spec."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from minitron.specs.blocks.base import Block, wrong
from minitron.specs.blocks.choices import sizes
from minitron.specs.blocks.distill import Distill
from minitron.specs.blocks.evaluate import Evaluate
from minitron.specs.blocks.importance import Importance
from minitron.specs.blocks.recovery import Recovery
from minitron.specs.blocks.search import RUNG_SHARE, Search
from minitron.specs.blocks.student import Student
from minitron.specs.blocks.teacher import Teacher
from minitron.specs.blocks.teacher_correction import TeacherCorrection
from minitron.specs.blocks.training import fit_warmup
from minitron.specs.float8 import Compute

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def _check_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        raise wrong(
            "{given} cannot name a build folder",
            "write up to 100 letters, digits, `.`, `_` and `-`, such as mistral-nemo-minitron-8b",
        )
    return name


Name = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": NAME_PATTERN})]


class Spec(Block):
    """The compression of a large language model into a smaller one."""

    apiVersion: Literal["minitron/v1"] = "minitron/v1"
    """The version of the spec language."""

    kind: Literal["Compression"] = "Compression"
    """The kind of document that this file is."""

    name: Name
    """Names the build folder and the lock file. Left out: the file's name."""

    teacher: Teacher
    """The model to make smaller."""

    student: Student
    """The shape of the student."""

    importance: Importance = Importance()
    """The scores that decide what stays."""

    recovery: Recovery = Recovery()
    """The repairs before any training."""

    search: Search | None = None
    """The choice of the student from several shapes."""

    teacher_correction: TeacherCorrection | None = None
    """Fine-tunes the teacher on the distillation data first."""

    distill: Distill | None = None
    """The training of the student on the teacher. Left out: nothing is trained."""

    evaluate: Evaluate | None = None
    """The measurements of teacher, pruned student and distilled student."""

    @model_validator(mode="after")
    def _fit_correction(self) -> Spec:
        """Fits the warm-up of the teacher correction to its tokens, which come in the batches of `distill`."""
        if self.teacher_correction is None or self.distill is None:
            return self
        batch = self.distill.sequence_length * max(sizes(self.distill.global_batch_size))
        optimizer = fit_warmup(self.teacher_correction.optimizer, self.teacher_correction.tokens // batch)
        correction = self.teacher_correction.model_copy(update={"optimizer": optimizer})
        return self.model_copy(update={"teacher_correction": correction})

    @model_validator(mode="after")
    def _fit_rungs(self) -> Spec:
        """Fits the tokens of the rungs to those of the distillation if they are not written."""
        if self.search is None or self.distill is None or "tokens" in self.search.rank.model_fields_set:
            return self
        tokens = max(1, min(self.search.rank.tokens, int(RUNG_SHARE * self.distill.tokens)))
        search = self.search.model_copy(update={"rank": self.search.rank.model_copy(update={"tokens": tokens})})
        return self.model_copy(update={"search": search})


def float8_uses(spec: Spec) -> tuple[tuple[Compute, str], ...]:
    """Returns what student and teacher compute in while the student is trained, each with its place in the spec."""
    if spec.distill is None:
        return ()
    return (spec.distill.compute, "distill.compute"), (spec.teacher.compute, "teacher.compute")
