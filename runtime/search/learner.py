"""A candidate in training: it learns from batches and teacher states that it shares with others, at its own rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.runtime.checkpoint import Checkpoints, TrainerState, load
from minitron.runtime.data import Batch
from minitron.runtime.disk import writing
from minitron.runtime.gradients import clip, sum_gradients
from minitron.runtime.hidden_states import HiddenStates, Recorder
from minitron.runtime.loss import DistillationLoss
from minitron.runtime.models import LanguageModel
from minitron.runtime.optimizer import set_learning_rate
from minitron.runtime.order import mix
from minitron.runtime.pieces import model_pieces, optimizer_pieces
from minitron.runtime.plan import LoadedPlan
from minitron.runtime.setup import compute_dtype_of, hidden_states_of, load_student, optimizer_of
from minitron.runtime.step import TeacherSide, student_loss
from minitron.runtime.world import World
from minitron.specs.builds import CHECKPOINTS
from minitron.specs.errors import WorkError
from minitron.specs.progress import Silent
from minitron.specs.training_plan import TrainingPlan


@dataclass(frozen=True)
class Shared:
    """A part of the samples, from `first` on, and what the teacher makes of it, with the hidden states that any of the learners
    is compared with: what all learners are given."""

    first: int
    batch: Batch
    teacher: TeacherSide


def trunk_rate(step: int, plan: TrainingPlan) -> float:
    """Returns the rate of a step of the trunk, counted from 0: a linear warm-up, then constant."""
    optimizer = plan.optimizer
    return optimizer.lr * min(1.0, (step + 1) / max(1, optimizer.warmup_steps))


def branch_rate(step: int, plan: TrainingPlan, begin: int, end: int) -> float:
    """Returns the rate of a step of a branch that leaves the trunk at step `begin` and has come down to zero at `end`: the
    trunk's times 1 - sqrt(progress) (arXiv 2405.18392, section 3). No step has a rate of zero: it would learn nothing, and a
    branch may have one step only."""
    return trunk_rate(step, plan) * (1.0 - math.sqrt((step - begin) / (end - begin)))


def branch_progress(step: int, plan: TrainingPlan, begin: int, end: int) -> float:
    """Returns the share of the training after which a weight that falls to 0 stands where a branch has it: that of the trunk at
    step `begin`, falling from there to 0 at `end`, as it is 0 at the end of the training that the branch foretells."""
    return 1.0 - (1.0 - begin / plan.steps) * (1.0 - (step - begin) / (end - begin))


@dataclass
class Learner:
    """One student, its optimizer, and how far it is. `rate` gives the learning rate of a step, `progress` the share of the
    training that is over at it, for a weight that falls; `diverged` says what was not finite, and the student then learns no
    more."""

    number: int
    plan: TrainingPlan
    student: LanguageModel
    optimizer: torch.optim.Optimizer
    world: World
    rate: Callable[[int], float]
    hidden: HiddenStates | None = None
    progress: Callable[[int], float] | None = None
    samples: int = 0
    diverged: str | None = None
    _micro: int = field(default=0, repr=False)
    _loss: Tensor | None = field(default=None, repr=False)

    @property
    def step(self) -> int:
        return self.samples // self.plan.global_batch_size

    def wants(self, first: int, until: int) -> bool:
        """Checks whether the samples from `first` on are the next ones that this student learns from."""
        return self.diverged is None and self.samples + self._micro == first < until

    def learn(self, shared: Shared, settings: DistillationLoss, valid: int) -> None:
        """Adds the gradients of a part of the global batch, which has `valid` tokens in all, and steps at its end."""
        batch, plan = shared.batch, self.plan
        rows = batch.input_ids_BL.shape[0]
        torch.manual_seed(mix(plan.seed, self.samples, 0, self._micro // rows))
        hidden = self.hidden
        if hidden is not None:
            hidden = hidden.at(self.step / plan.steps if self.progress is None else self.progress(self.step))
        dtype = compute_dtype_of(plan, self.world)
        total, _terms = student_loss(self.student, batch, shared.teacher, settings, hidden, float(max(1, valid)), dtype)
        total.backward()  # type: ignore[no-untyped-call]
        loss = total.detach()
        self._loss = loss if self._loss is None else self._loss + loss
        self._micro += rows
        if self._micro == plan.global_batch_size:
            self._step()

    def _step(self) -> None:
        parameters = list(self.student.module.parameters())
        norm = float(sum_gradients(parameters, self.world))
        loss = float(self._loss) if self._loss is not None else math.nan
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.diverged = f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {self.step + 1} is not finite"
        else:
            clip(parameters, norm, self.plan.optimizer.clip_grad_norm)
            set_learning_rate(self.optimizer, self.rate(self.step))
            self.optimizer.step()
            self.samples += self.plan.global_batch_size
        self.optimizer.zero_grad(set_to_none=True)
        self._micro, self._loss = 0, None


@dataclass(frozen=True)
class CandidateStore:
    """The folders of the candidates, from which learners are made and where their checkpoints lie; and the teacher, hooked by
    `recorder` where their hidden states are compared with its own."""

    loaded: LoadedPlan
    world: World
    identity: Callable[[TrainingPlan], dict[str, Any]]
    teacher: LanguageModel
    recorder: Recorder | None = None

    def load(self, number: int, plan: TrainingPlan, folder: Path, rate: Callable[[int], float]) -> Learner:
        """Loads a candidate's student, with weights and moments of its newest checkpoint where there is one."""
        own = replace(self.loaded, plan=plan)
        student = load_student(own, self.world)
        hidden = None if self.recorder is None else hidden_states_of(own, self.teacher, student, self.recorder)
        student.module.train()
        optimizer = optimizer_of(plan, student)
        learner = Learner(number, plan, student, optimizer, self.world, rate, hidden)
        checkpoint = Checkpoints(folder / CHECKPOINTS, 1).newest(Silent(), self.world)
        if checkpoint is not None:
            if checkpoint.identity != self.identity(plan):
                raise WorkError(
                    f"{folder} holds the training of another candidate; remove {folder.parent} to search again"
                )
            load(checkpoint, student.module, optimizer)
            learner.samples = checkpoint.state.samples
        return learner

    def save(self, learner: Learner, folder: Path) -> None:
        """Writes a checkpoint of a learner between two steps, and removes the one before it."""
        plan = learner.plan
        state = TrainerState(learner.step, learner.samples, learner.samples * plan.sequence_length)
        module = learner.student.module
        pieces = {"model": model_pieces(module), "optimizer": optimizer_pieces(module, learner.optimizer)}
        on_host = {
            kind: {name: replace(piece, tensor=piece.tensor.cpu()) for name, piece in of.items()}
            for kind, of in pieces.items()
        }
        checkpoints = Checkpoints(folder / CHECKPOINTS, 1)
        with writing(str(folder)):
            checkpoints.write_part(state, 0, 1, on_host)
            checkpoints.publish(state, 1, self.identity(plan), None)


def saved_step(folder: Path) -> int | None:
    """Returns the step of the newest checkpoint in a candidate's folder; None where there is none."""
    names = Checkpoints(folder / CHECKPOINTS, 1).names()
    return int(names[0].name.removeprefix("step-")) if names else None
