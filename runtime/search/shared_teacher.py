"""The loop of several learners: samples come in order, the teacher reads each once, and every learner learns from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from minitron.runtime.attention import fastest_attention
from minitron.runtime.data import Batch, Corpus, Windows
from minitron.runtime.held_out import autocast, evaluating, require_tokens
from minitron.runtime.hidden_states import Recorder, States
from minitron.runtime.loss import DistillationLoss, Head, distillation_loss, shared_logits
from minitron.runtime.models import LanguageModel
from minitron.runtime.search.learner import Learner, Shared
from minitron.runtime.step import TeacherSide
from minitron.runtime.world import World


@dataclass(frozen=True)
class Figures:
    """The means over the held-out tokens, in nats: the divergence from the teacher and -log p."""

    kl: float
    loss: float
    tokens: int


@dataclass
class SharedTeacher:
    """The things that learners share: the teacher, the samples and the loss. `part` sequences go through the models at a time;
    `recorder` takes the teacher's hidden states that any learner is compared with."""

    teacher: LanguageModel | None
    corpus: Corpus
    settings: DistillationLoss
    world: World
    part: int
    recorder: Recorder | None = None
    _valid: dict[tuple[int, int], int] = field(default_factory=dict)

    def train(
        self, learners: Sequence[Learner], until: Callable[[Learner], int], after_part: Callable[[int], None]
    ) -> None:
        """Trains every learner up to the sample that `until` names. `after_part` is called after each part of the samples with
        the number of learners that learnt it; where it raises, learners stand between two parts."""
        ends = {id(learner): until(learner) for learner in learners}
        first = min((learner.samples for learner in learners), default=0)
        with torch.random.fork_rng([self.world.device] if self.world.device.type == "cuda" else []):
            for start in range(first, max(ends.values(), default=0), self.part):
                here = [learner for learner in learners if learner.wants(start, ends[id(learner)])]
                if not here:
                    continue
                shared = self._shared(start, len(here))
                with fastest_attention(self.world.device):
                    for learner in here:
                        size = learner.plan.global_batch_size
                        learner.learn(shared, self.settings, self._count(start // size * size, size))
                after_part(len(here))

    def _shared(self, start: int, learners: int) -> Shared:
        batch = self.corpus.batch(range(start, start + self.part)).to(self.world.device)
        recording: AbstractContextManager[States] = (
            nullcontext({}) if self.recorder is None else self.recorder.recording()
        )
        with recording as states:
            teacher_TE, head = self._read(batch)
        logits_SV = self._logits(teacher_TE, head, learners)
        return Shared(start, batch, TeacherSide(teacher_TE, head, logits_SV=logits_SV, states=states))

    def _logits(self, teacher_TE: torch.Tensor | None, head: Head | None, students: int) -> torch.Tensor | None:
        """The teacher's product with its head, where several students read it."""
        if teacher_TE is None or head is None or students == 1 or self.settings.weight == 0:
            return None
        return shared_logits(teacher_TE, head, self.settings.chunk_tokens)

    def _read(self, batch: Batch) -> tuple[torch.Tensor | None, Head | None]:
        if self.teacher is None:
            return None, None
        with torch.no_grad():
            return batch.pick(self.teacher.hidden_states(batch.input_ids_BL)), self.teacher.head

    def _count(self, start: int, size: int) -> int:
        """The valid tokens of a global batch; only those that are being learnt are remembered."""
        if (start, size) not in self._valid:
            self._valid = {key: value for key, value in self._valid.items() if key[0] + key[1] > start}
            self._valid[start, size] = int(self.corpus.batch(range(start, start + size)).valid_BL.sum())
        return self._valid[start, size]

    @torch.no_grad()
    def judge(self, students: Sequence[LanguageModel], windows: Windows, dtype: torch.dtype) -> list[Figures]:
        """Compares students with the teacher on the held-out text, which the teacher reads once."""
        assert self.teacher is not None, "a search has a teacher"
        settings = DistillationLoss("forward_kl", 1.0, 1.0, 1.0, self.settings.chunk_tokens)
        sums = torch.zeros(len(students), 2, dtype=torch.float64)
        tokens = 0
        for start in range(0, len(windows), self.part):
            batch = windows.batch(range(start, min(start + self.part, len(windows)))).to(self.world.device)
            teacher_TE, head = self._read(batch)
            logits = self._logits(teacher_TE, head, len(students))
            labels_T = batch.pick(batch.labels_BL)
            tokens += labels_T.shape[0]
            for index, student in enumerate(students):
                with evaluating(student), autocast(self.world.device, dtype):
                    student_TD = batch.pick(student.hidden_states(batch.input_ids_BL))
                own = student.head
                detached = Head(
                    own.weight_VD.detach(), None if own.bias_V is None else own.bias_V.detach(), own.scale, own.softcap
                )
                terms = distillation_loss(
                    settings,
                    student_TD,
                    detached,
                    teacher_TE,
                    head,
                    labels_T,
                    normaliser=1.0,
                    compute_dtype=dtype,
                    teacher_SV=logits,
                )
                sums[index] += torch.stack([terms.divergence, terms.cross_entropy]).double().cpu()
        require_tokens(tokens)
        return [Figures(float(kl) / tokens, float(loss) / tokens, tokens) for kl, loss in sums.tolist()]
