"""The routes to the student's function: its rewritten graph, and the model that transformers loads from student/."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from minitron.compiler.emit.student import student_weights
from minitron.compiler.graph.names import Fetch
from minitron.compiler.verify.comparison import Floor, measured
from minitron.compiler.verify.hugging_face import load_model, logits_of
from minitron.compiler.verify.perturbed import perturbed
from minitron.compiler.verify.subject import Subject
from minitron.compiler.verify.teacher_routes import TeacherRoutes
from minitron.compiler.verify.widened import InFloat32, Say
from minitron.specs.builds import STUDENT

# Tokens at the end of the ids that a prompt leaves out: what is generated stays within the longest sequence.
CONTINUED = 4


class Routes:
    """Logits [B, S, V] for the same token ids, each computed when it is first asked for; `teacher` has the teacher's. `say`
    is told what costs memory."""

    def __init__(self, subject: Subject, ids: torch.Tensor, say: Say) -> None:
        self.subject, self.ids, self._say = subject, ids, say
        self.teacher = TeacherRoutes(subject.original, ids, say)

    @property
    def prompt(self) -> torch.Tensor:
        """The ids without the last few, so that as many can be generated."""
        return self.ids[:, : max(1, self.ids.shape[1] - CONTINUED)]

    @cached_property
    def model(self) -> Any:
        """student/, loaded fresh by transformers in the dtype of its files."""
        captured = self.subject.teacher.captured
        return load_model(self.subject.build / STUDENT, captured.attention, captured.dtype)

    @cached_property
    def loaded(self) -> torch.Tensor:
        """The logits of `model`, run in float32."""
        return self.wide.run(lambda _: logits_of(self.model, self.ids))

    @cached_property
    def wide(self) -> InFloat32:
        """`model`, ready to be run in float32."""
        captured, buffers = self.subject.teacher.captured, self.subject.student.buffers
        return InFloat32(self.model, captured, buffers, self.subject.original.settings.device, self._say)

    @cached_property
    def rewritten(self) -> torch.Tensor:
        """The rewritten graph on weights that are made of the teacher's in memory."""
        return self._rewritten(self._weights)

    @cached_property
    def floor(self) -> Floor:
        """The changes that rounding makes to the student's logits."""
        return measured(self._rewritten(perturbed(self._weights)), self.rewritten)

    @property
    def _weights(self) -> Fetch:
        subject = self.subject
        return student_weights(subject.source, subject.student.recipes, subject.teacher.captured.stored_dtype)

    def _rewritten(self, fetch: Fetch) -> torch.Tensor:
        student = self.subject.student
        return self.teacher.graph(student.graph_module, fetch, student.buffers)[0]
