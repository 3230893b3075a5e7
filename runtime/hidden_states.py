"""Hidden states of teacher and student, compared layer by layer during training.

Layers are counted from 0. The state of layer n is the output of decoder layer n: the residual stream after the layer,
before any norm that reads it. The state of the embedding is the input of layer 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron.runtime.data import Batch
from minitron.runtime.loss import HiddenStateLoss, HiddenStateTerm, hidden_state_loss
from minitron.runtime.models import LanguageModel
from minitron.runtime.order import mix
from minitron.specs.blocks.distill import HiddenStateLoss as Settings
from minitron.specs.errors import Problem, Refused
from minitron.specs.training_consistency import pairs_exist

PROJECTION = "hidden_state_projection"
"""The student's submodule that holds the projection during training: optimizer, gradient sums and checkpoints treat it
as they treat the head. The final model does not contain it.
"""

EMBEDDING = -1

States = dict[int, Tensor]
"""[B, L, width] by layer number."""


class Recorder:
    """Records the outputs of some layers of a model during a forward pass. Nothing is recorded outside `recording`."""

    def __init__(self, model: LanguageModel, numbers: Sequence[int], *, embedding: bool) -> None:
        assert model.layers is not None
        self._states: States = {}
        self._recording = False
        for number in set(numbers):
            model.layers[number].register_forward_hook(self._keeper(number))
        if embedding:
            model.layers[0].register_forward_pre_hook(self._keep_given, with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[States]:
        """Yields the states [B, L, width] by layer number; the mapping is filled once the forward pass has run."""
        self._states, self._recording = {}, True
        try:
            yield self._states
        finally:
            self._states, self._recording = {}, False

    def _keeper(self, number: int) -> Any:
        def keep(_module: Any, _given: Any, yielded: Any) -> None:
            if self._recording:
                self._states[number] = yielded[0] if isinstance(yielded, tuple) else yielded

        return keep

    def _keep_given(self, _module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._recording:
            self._states[EMBEDDING] = given[0] if given else named["hidden_states"]


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states that a training compares in addition to the logits. `pairs` are (teacher layer, student
    layer).
    """

    settings: HiddenStateLoss
    pairs: tuple[tuple[int, int], ...]
    teacher: Recorder
    student: Recorder

    @contextmanager
    def recording(self) -> Iterator[tuple[States, States]]:
        """Yields the states of the teacher and of the student; each mapping is filled once its model has run."""
        with self.teacher.recording() as theirs, self.student.recording() as ours:
            yield theirs, ours

    def loss(
        self,
        batch: Batch,
        teacher_states: States,
        student: LanguageModel,
        student_states: States,
        logits_T: Tensor,
        *,
        normaliser: float,
        compute_dtype: torch.dtype,
    ) -> HiddenStateTerm:
        """Computes the loss term of one micro batch, from the states [B, L, width] of its forward passes and each valid
        token's logit loss.
        """
        projection = getattr(student.module, PROJECTION, None)
        sequences, length = batch.input_ids_BL.shape
        every_T = torch.arange(sequences, device=logits_T.device).repeat_interleave(length)
        return hidden_state_loss(
            self.settings,
            [batch.pick(student_states[ours]) for _, ours in self.pairs],
            [batch.pick(teacher_states[theirs]) for theirs, _ in self.pairs],
            None if projection is None else projection.weight,
            logits_T=logits_T,
            sequence_T=every_T if batch.rows_T is None else every_T[batch.rows_T],
            sequences=sequences,
            normaliser=normaliser,
            compute_dtype=compute_dtype,
        )


def prepare_hidden_states(
    settings: Settings, teacher: LanguageModel, student: LanguageModel, chunk_tokens: int, seed: int
) -> HiddenStates:
    """Hooks both models, and gives the student a projection where the widths differ. Refused with every layer that does
    not exist.
    """
    models = {"teacher": teacher, "student": student}
    message, hint = "is not there, and `loss.hidden_states` needs it", "compile again, or write where the layers stand"
    if absent := [Problem(f"{name}.layers", message, hint) for name, model in models.items() if model.layers is None]:
        raise Refused(absent)
    assert teacher.layers is not None and student.layers is not None
    depths = len(teacher.layers), len(student.layers)
    if wrong := list(pairs_exist(settings, *depths, at="loss.hidden_states")):
        raise Refused(wrong)
    pairs = ((depths[0] - 1, depths[1] - 1),) if isinstance(settings.pairs, str) else settings.pairs
    widths, device = (teacher.width, student.width), next(teacher.module.parameters()).device
    if widths[0] != widths[1]:
        projection = torch.nn.Linear(widths[1], widths[0], bias=False, device=device)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # Drawn on the CPU and from the seed: the same on every rank, whatever was drawn before.
            torch.manual_seed(mix(seed, *widths))
            projection.weight.copy_(torch.nn.init.orthogonal_(torch.empty(widths)))
        student.module.add_module(PROJECTION, projection)
    embedding = settings.embedding
    return HiddenStates(
        HiddenStateLoss(settings.distance, None if settings.weight == "dynamic" else settings.weight, chunk_tokens),
        (*pairs, *(((EMBEDDING, EMBEDDING),) if embedding else ())),
        Recorder(teacher, [pair[0] for pair in pairs], embedding=embedding),
        Recorder(student, [pair[1] for pair in pairs], embedding=embedding),
    )


def remove_projection(student: LanguageModel) -> None:
    """Removes the projection before the student is written as the final model."""
    if hasattr(student.module, PROJECTION):
        delattr(student.module, PROJECTION)
