"""Hidden states of teacher and student, compared layer by layer during training.

Layers are counted from 0. The state of layer n is the output of decoder layer n: the residual stream after the layer,
before any norm that reads it. The state of the embedding is the input of layer 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minitron.runtime.data import Batch
from minitron.runtime.loss import HiddenStateLoss, HiddenStateTerm, hidden_state_loss
from minitron.runtime.models import LanguageModel
from minitron.runtime.order import mix
from minitron.specs.blocks.distill import HiddenStateLoss as Settings
from minitron.specs.errors import Problem, Refused, WorkError, first_line
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
    layer); `kept` are the channels [D] or components [E, D] of the teacher's states that the student's are compared with.
    """

    settings: HiddenStateLoss
    pairs: tuple[tuple[int, int], ...]
    teacher: Recorder
    student: Recorder
    kept: Tensor | None = None
    fades: bool = False

    def at(self, progress: float) -> HiddenStates:
        """Returns the same comparison with the weight that it has after the share `progress` of all steps."""
        return replace(self, settings=replace(self.settings, factor=1.0 - progress)) if self.fades else self

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
            kept=self.kept,
            logits_T=logits_T,
            sequence_T=every_T if batch.rows_T is None else every_T[batch.rows_T],
            sequences=sequences,
            normaliser=normaliser,
            compute_dtype=compute_dtype,
        )


def read_coordinates(path: Path) -> Tensor:
    """Reads what the student keeps of the teacher's hidden states: `index` [D] or `matrix` [E, D]. Refused where there is no
    file, WorkError where it cannot be read.
    """
    if not path.is_file():
        raise Refused([Problem("kept_coordinates", f"there is no file {path}", "compile again")])
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise WorkError(f"{path} could not be read ({first_line(error)}); compile again") from None
    found = [(name, value) for name, value in tensors.items() if (name, value.dim()) in (("index", 1), ("matrix", 2))]
    if len(tensors) != 1 or not found:
        raise WorkError(f"{path} holds {sorted(tensors)} instead of `index` or `matrix`; compile again")
    ((name, value),) = found
    coordinates: Tensor = value.long() if name == "index" else value.float()
    return coordinates


def record_teacher(teacher: LanguageModel, of: Sequence[Settings]) -> Recorder:
    """Hooks every layer of the teacher that one of several students is compared with: they share its pass. `pairs` are
    listed or `last:last`. Refused where the layers are not known.
    """
    _require_layers(teacher=teacher)
    assert teacher.layers is not None
    last = len(teacher.layers) - 1
    compared = {pair[0] for one in of if not isinstance(one.pairs, str) for pair in one.pairs}
    compared |= {last for one in of if one.pairs == "last:last"}
    return Recorder(teacher, sorted(compared), embedding=any(one.embedding for one in of))


# parameters: two models, and what is shared between students in a search
def prepare_hidden_states(
    settings: Settings,
    teacher: LanguageModel,
    student: LanguageModel,
    chunk_tokens: int,
    seed: int,
    kept: Tensor | None = None,
    recorder: Recorder | None = None,
) -> HiddenStates:
    """Hooks both models, and gives the student a projection where the widths differ and nothing says what it keeps. With a
    `recorder` the teacher is hooked already. Refused with every layer that does not exist, and where `kept` does not lead from
    the one width to the other.
    """
    _require_layers(teacher=teacher, student=student)
    assert teacher.layers is not None and student.layers is not None
    pairs = _pairs(settings, len(teacher.layers), len(student.layers))
    widths, device = (teacher.width, student.width), next(teacher.module.parameters()).device
    averaged = settings.coordinates == "kept"
    if averaged:
        _check_coordinates(kept, *widths)
    elif widths[0] != widths[1]:
        projection = torch.nn.Linear(widths[1], widths[0], bias=False, device=device)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # Drawn on the CPU and from the seed: the same on every rank, whatever was drawn before.
            torch.manual_seed(mix(seed, *widths))
            projection.weight.copy_(torch.nn.init.orthogonal_(torch.empty(widths)))
        student.module.add_module(PROJECTION, projection)
    embedding, weight = settings.embedding, None if settings.weight == "dynamic" else settings.weight
    return HiddenStates(
        HiddenStateLoss(settings.distance, weight, chunk_tokens, averaged),
        (*pairs, *(((EMBEDDING, EMBEDDING),) if embedding else ())),
        recorder or Recorder(teacher, [pair[0] for pair in pairs], embedding=embedding),
        Recorder(student, [pair[1] for pair in pairs], embedding=embedding),
        kept.to(device) if averaged and kept is not None else None,
        settings.schedule == "linear",
    )


def _require_layers(**models: LanguageModel) -> None:
    message, hint = "is not there, and `loss.hidden_states` needs it", "compile again, or write where the layers stand"
    if absent := [Problem(f"{name}.layers", message, hint) for name, model in models.items() if model.layers is None]:
        raise Refused(absent)


def _pairs(settings: Settings, theirs: int, own: int) -> tuple[tuple[int, int], ...]:
    """Returns the pairs of layers that are compared, of models with these numbers of layers. Refused where a layer does not
    exist."""
    at = "loss.hidden_states"
    if settings.pairs == "last:last":
        return ((theirs - 1, own - 1),)
    if settings.pairs == "all":
        if theirs != own:
            message = f"`all` does not say which of the teacher's {theirs} layers the student's {own} were cut from"
            raise Refused([Problem(f"{at}.pairs", message, "compile again, or list the pairs")])
        return tuple((layer, layer) for layer in range(own))
    if wrong := list(pairs_exist(settings, theirs, own, at=at)):
        raise Refused(wrong)
    return settings.pairs


def _check_coordinates(kept: Tensor | None, theirs: int, own: int) -> None:
    """Checks that the kept coordinates lead from states of the teacher's width to those of the student's."""
    if kept is None:
        if theirs == own:
            return
        message = f"is not there, and `coordinates: kept` needs it: the widths are {theirs} and {own}"
        raise Refused([Problem("kept_coordinates", message, "compile again, or write `coordinates: projected`")])
    whole = kept.dim() == 2 and kept.shape[0] == theirs
    chosen = kept.dim() == 1 and bool(((kept >= 0) & (kept < theirs)).all())
    if kept.shape[-1] != own or not (whole or chosen):
        message = f"does not lead from the teacher's {theirs} channels to the student's {own}"
        raise Refused([Problem("kept_coordinates", message, "compile again")])


def remove_projection(student: LanguageModel) -> None:
    """Removes the projection before the student is written as the final model."""
    if hasattr(student.module, PROJECTION):
        delattr(student.module, PROJECTION)
