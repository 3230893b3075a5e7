"""One optimizer step: the global batch forward and backward in micro batches, gradients summed, clipped, applied."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron.runtime.attention import fastest_attention
from minitron.runtime.checkpoint import TrainerState
from minitron.runtime.data import Batch
from minitron.runtime.disk import writing
from minitron.runtime.feed import Given
from minitron.runtime.gradients import clip, sum_gradients
from minitron.runtime.held_out import autocast
from minitron.runtime.hidden_states import HiddenStates, States
from minitron.runtime.loss import DistillationLoss, Head, SampledTargets, distillation_loss
from minitron.runtime.models import LanguageModel
from minitron.runtime.optimizer import set_learning_rate
from minitron.runtime.order import mix
from minitron.runtime.schedule import learning_rate
from minitron.runtime.setup import Run
from minitron.specs.atomic import atomic_path
from minitron.specs.builds import CHECKPOINTS
from minitron.specs.errors import WorkError


def train_step(run: Run, state: TrainerState) -> dict[str, float]:
    """Learns the global batch that follows `state`. Returns the step's figures: the loss and its terms as means
    over all valid tokens of the batch, the learning rate, and the norm of the gradient before clipping.

    WorkError where loss or gradient are not finite; the weights are then as they were, and the batch is saved. WorkError
    on all ranks where one of them cannot read its batch.
    """
    plan, world = run.plan, run.world
    given, unread = _take(run, state.step)
    valid, failed = world.total(0 if given is None else given.valid, unread is not None)
    if failed:
        world.raise_together(unread)
    assert given is not None
    normaliser = float(max(1, valid))  # a batch that is masked throughout has loss 0 and gradient 0
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    hidden = None if run.hidden is None else run.hidden.at(state.step / plan.steps)
    with fastest_attention(world.device):
        for number, (micro, targets) in enumerate(given.micro_batches):
            # What dropout draws, where a model has it, follows from the sample too: nothing to save, nothing to lose.
            torch.manual_seed(mix(plan.seed, state.samples, world.rank, number))
            total, terms = micro_batch_loss(run, micro, targets, normaliser, hidden)
            total.backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([total.detach(), *terms])
    parameters = list(run.student.module.parameters())
    norm = sum_gradients(parameters, world)
    # The one place where the host waits for the device: whether the weights change is decided here.
    loss, divergence, cross_entropy, hidden_states, grad_norm = torch.cat(
        [world.sum(sums), norm.to(sums).reshape(1)]
    ).tolist()
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
        raise _not_finite(run, state, given.batch, what)
    clip(parameters, grad_norm, plan.optimizer.clip_grad_norm)
    held = 0 if plan.start is None else plan.start.step
    lr = learning_rate(state.step, plan.steps, plan.optimizer, lambda steps: run.course.state(steps).tokens, held)
    set_learning_rate(run.optimizer, lr)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    figures = {"loss": loss}
    if run.loss.weight:
        figures[run.loss.divergence] = divergence
    if run.loss.cross_entropy:
        figures["cross_entropy"] = cross_entropy
    if run.hidden is not None:
        figures["hidden_states"] = hidden_states
    return figures | {"lr": lr, "grad_norm": grad_norm}


def _take(run: Run, step: int) -> tuple[Given | None, WorkError | None]:
    """Returns the batch of a step, or why it cannot be read: the others would wait for a rank that stopped alone."""
    try:
        return run.feed.take(step), None
    except WorkError as error:
        return None, error


@dataclass(frozen=True)
class TeacherSide:
    """The teacher's side of a micro batch: its hidden states [T, E] and head, or samples of its distribution that were stored;
    its logits, where several students share them; and the states [B, L, E] of the layers that the student's are compared
    with."""

    hidden_TE: Tensor | None = None
    head: Head | None = None
    targets: SampledTargets | None = None
    logits_SV: Tensor | None = None
    states: States = field(default_factory=dict)


def micro_batch_loss(
    run: Run, batch: Batch, targets: SampledTargets | None, normaliser: float, hidden: HiddenStates | None
) -> tuple[Tensor, list[Tensor]]:
    """The share of one micro batch in the loss of the global batch, and of its terms: divergence, cross-entropy,
    hidden states."""
    recording: AbstractContextManager[States] = nullcontext({}) if hidden is None else hidden.teacher.recording()
    teacher_TE, teacher_head = None, None
    with recording as states:
        if (teacher := run.teacher) is not None:
            with torch.no_grad():
                teacher_TE = teacher.gathered(lambda: batch.pick(teacher.hidden_states(batch.input_ids_BL)))
            teacher_head = teacher.head  # stays gathered: see `shard_teacher`
    theirs = TeacherSide(teacher_TE, teacher_head, targets, states=states)
    # All of the student's part in there: the loss reads the weight of the head.
    return run.student.gathered(
        lambda: student_loss(run.student, batch, theirs, run.loss, hidden, normaliser, run.compute_dtype)
    )


def student_loss(
    student: LanguageModel,
    batch: Batch,
    theirs: TeacherSide,
    settings: DistillationLoss,
    hidden: HiddenStates | None,
    normaliser: float,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """Runs the student on a micro batch. Returns the loss and its terms, as `micro_batch_loss` does."""
    recording: AbstractContextManager[States] = nullcontext({}) if hidden is None else hidden.student.recording()
    with recording as ours, autocast(batch.input_ids_BL.device, compute_dtype):
        student_TD = batch.pick(student.hidden_states(batch.input_ids_BL))
    terms = distillation_loss(
        settings,
        student_TD,
        student.head,
        theirs.hidden_TE,
        theirs.head,
        batch.pick(batch.labels_BL),
        normaliser=normaliser,
        compute_dtype=compute_dtype,
        targets=theirs.targets,
        head_gradient_VD=head_gradient(student),
        teacher_SV=theirs.logits_SV,
    )
    if hidden is None:
        return terms.total, [terms.divergence, terms.cross_entropy, torch.zeros_like(terms.divergence)]
    logits_T = terms.divergence_T * (settings.weight * settings.temperature**2)
    distance = hidden.loss(
        batch, theirs.states, student, ours, logits_T, normaliser=normaliser, compute_dtype=compute_dtype
    )
    return terms.total + distance.total, [terms.divergence, terms.cross_entropy, distance.distance]


def head_gradient(student: LanguageModel) -> Tensor | None:
    """The sum of gradients that the loss adds the head's to, where that lies whole on this rank in fp32: autograd would make a
    second one for each micro batch first."""
    weight_VD = student.head.weight_VD
    if student.root is not None or weight_VD.dtype != torch.float32 or not weight_VD.requires_grad:
        return None
    if weight_VD.grad is None:
        weight_VD.grad = torch.zeros_like(weight_VD)
    return weight_VD.grad


def _not_finite(run: Run, state: TrainerState, batch: Batch, what: str) -> WorkError:
    """Keeps what was computed on, for whoever looks for the reason: each rank its part. All ranks say the same."""
    name, ranks = f"not-finite-step-{state.step + 1}", run.world.size > 1
    path = run.work / (f"{name}-rank-{run.world.rank}.safetensors" if ranks else f"{name}.safetensors")
    saved = f"the batch was saved as {run.work / name}{'-rank-*' if ranks else ''}.safetensors"
    try:
        with writing(str(path)), atomic_path(path) as temporary:
            save_file({"input_ids": batch.input_ids_BL, "labels": batch.labels_BL}, temporary)
    except WorkError as error:
        saved = f"the batch could not be saved ({error})"
    newest = next(iter(run.saver.checkpoints.names()), None)
    kept = "no checkpoint was written yet" if newest is None else f"the checkpoint {newest.name} was kept"
    advice = (
        f"Often the learning rate is too high: lower `optimizer.lr`, delete {run.work / CHECKPOINTS} and train again"
    )
    if state.step == 0:
        advice = (
            "Nothing has been learnt yet, so it is not the learning rate: look for values that are not finite in the weights "
            "of teacher and student, and for a `dtype` or `compute_dtype` that is too narrow for the model"
        )
    return WorkError(f"the {what} at step {state.step + 1}: {kept} and {saved}. {advice}")
