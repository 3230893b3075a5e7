"""Teacher correction: before distillation, the teacher is fine-tuned on the distillation data (arXiv 2408.11796,
section "Teacher Correction").

The correction is a training like any other: its student is the teacher, its loss is the cross-entropy, and its result
is BUILD/teacher. That folder records what it was made from, so that the correction runs once and runs again when a
setting changes.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron.runtime.data import data_hash
from minitron.runtime.disk import writing
from minitron.runtime.finished import read_finished, write_finished
from minitron.runtime.identity import resume_identity, weights_digest
from minitron.runtime.loop import learn, measure_held_out
from minitron.runtime.metrics import last_held_out_loss
from minitron.runtime.models import DTYPES, model_folder
from minitron.runtime.output import Weights, whole_weights, write_model
from minitron.runtime.plan import LoadedPlan
from minitron.runtime.setup import Run, Session, prepare, resume
from minitron.specs.atomic import remove_leftovers, write_text
from minitron.specs.blocks.distill import LogitLoss, Loss
from minitron.specs.builds import (
    CARD,
    CHECKPOINTS,
    CORRECTION,
    FINISHED,
    METRICS,
    MLFLOW,
    TENSORBOARD,
    TRACKERS,
    WANDB,
)
from minitron.specs.errors import placing
from minitron.specs.progress import Progress
from minitron.specs.training_plan import ModelPlan, TrainingPlan

_IDENTITY = "identity.json"
_BEFORE = "before.json"

_PLACES = {"student": "teacher", "tokens": "teacher_correction.tokens", "optimizer": "teacher_correction.optimizer"}
"""The places in training.yaml of the values of the correction's own plan."""


@dataclass(frozen=True)
class Correction:
    """The correction of a teacher: `loaded` is the plan of the correction, `source` the folder of the original teacher,
    `identity` everything that decides the result.
    """

    loaded: LoadedPlan
    source: Path
    identity: dict[str, Any]

    @property
    def plan(self) -> TrainingPlan:
        return self.loaded.training()

    @property
    def work(self) -> Path:
        """Returns the folder of checkpoints and metrics."""
        return self.loaded.folder / self.plan.work

    @property
    def output(self) -> Path:
        """Returns the folder of the corrected teacher."""
        return self.loaded.folder / self.plan.output

    def done(self) -> bool:
        """Checks whether the corrected teacher exists, was made with these settings, and is whole. UsageError where
        somebody has put other weights there. (The note about its files is gone where a user removed the work folder.)
        """
        if read_record(self.output).get("identity") != self.identity:
            return False
        note = read_finished(self.work / FINISHED)
        return note is None or note.damage(self.output) is None

    def begin(self, progress: Progress) -> None:
        """Prepares the work folder for this correction: files of another correction are removed, and so is what a
        killed process left beside the folder.
        """
        remove_leftovers(self.output.parent, self.output.name)
        before = _read(self.work / _IDENTITY) or read_record(self.output).get("identity")
        if before is not None and before != self.identity:
            changed = sorted(
                key for key in before.keys() | self.identity.keys() if before.get(key) != self.identity.get(key)
            )
            progress.message(
                f"the teacher was corrected with other settings ({', '.join(changed)}): it is corrected again"
            )
            self._forget()
        with writing(str(self.work)):
            write_text(self.work / _IDENTITY, json.dumps(self.identity, indent=1) + "\n")

    def _forget(self) -> None:
        """Removes the files that a training with other settings wrote into the work folder, and no other files in
        it.
        """
        for name in (CHECKPOINTS, TENSORBOARD, WANDB, MLFLOW):
            shutil.rmtree(self.work / name, ignore_errors=True)
        for name in (METRICS, TRACKERS, FINISHED, _BEFORE, _IDENTITY):
            (self.work / name).unlink(missing_ok=True)

    def remember(self, loss: float) -> None:
        """Stores the held-out loss of the original teacher, for a correction that is interrupted."""
        with writing(str(self.work)):
            write_text(self.work / _BEFORE, json.dumps({"held_out_loss": loss}) + "\n")

    def before(self) -> float | None:
        """Returns the held-out loss of the original teacher; None where it was not measured."""
        return (_read(self.work / _BEFORE) or {}).get("held_out_loss")


def read_record(folder: Path) -> dict[str, Any]:
    """Reads the record of what a corrected teacher was made from and what the correction changed; empty where `folder`
    holds none.
    """
    return _read(folder / CORRECTION) or {}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def correction_of(loaded: LoadedPlan, data_hash: str) -> Correction | None:
    """Returns the correction that the plan asks for; None where the plan asks for none."""
    plan = loaded.training()
    settings = plan.teacher_correction
    if settings is None:
        return None
    source = model_folder(loaded, "teacher", plan.teacher)
    teacher = plan.teacher
    own = plan.model_copy(
        update={
            "student": ModelPlan(
                model=str(source),
                dtype=teacher.dtype,
                head=teacher.head,
                layers=teacher.layers,
                flops_per_token=teacher.flops_per_token,
            ),
            "output": settings.output,
            "work": settings.work,
            "teacher_correction": None,
            "teacher_logits": "online",
            "phases": (),
            "start": None,
            "tokens": settings.tokens,
            "optimizer": settings.optimizer,
            "loss": Loss(logits=LogitLoss(weight=0.0), cross_entropy=1.0, chunk_tokens=plan.loss.chunk_tokens),
            "checkpoint": plan.checkpoint.model_copy(update={"every_tokens": settings.every_tokens}),
        }
    )
    of_training = resume_identity(own, data_hash)
    kept = ("tokens", "sequence_length", "global_batch_size", "seed", "shuffle", "data")
    identity = {key: value for key, value in of_training.items() if key in kept or key.startswith("optimizer.")}
    identity |= {"teacher": weights_digest(source), "dtype": teacher.dtype}
    return Correction(replace(loaded, plan=own, places=_PLACES), source, json.loads(json.dumps(identity)))


def corrected(loaded: LoadedPlan, session: Session) -> LoadedPlan:
    """Returns the plan with the corrected teacher as its teacher, and trains that teacher first where it does not exist
    yet; returns the plan itself where it asks for no correction. Resumes, is interrupted and fails as `train` does.
    """
    plan = loaded.training()
    correction = correction_of(loaded, data_hash(session.data, session.encoder, plan.tokens))
    if correction is None:
        return loaded
    if not correction.done():
        with placing(correction.loaded):
            _correct(correction, session)
        # Hooks and modules hold each other: without this the memory of that training is still taken in the next.
        gc.collect()
    return with_corrected_teacher(loaded, correction)


def _correct(correction: Correction, session: Session) -> None:
    world, progress = session.world, session.progress
    world.from_leader(lambda: correction.begin(progress))
    run = prepare(session, correction.loaded, correction.identity)
    state = resume(run, progress)
    if state.step == 0 and run.held_out is not None:
        before = measure_held_out(run).loss
        world.from_leader(lambda: correction.remember(before))
    with session.interrupt.deferring():
        learn(run, state, session.interrupt, progress, "correct teacher")
    weights = whole_weights(run.student, DTYPES[run.plan.student.dtype], world)
    world.from_leader(lambda: _finish(correction, run, weights, progress))


def _finish(correction: Correction, run: Run, weights: Weights, progress: Progress) -> None:
    before, after = correction.before(), last_held_out_loss(run.work / METRICS)
    plan = correction.plan
    files = _files(correction, before, after)
    write_model(run.student, weights, correction.source, correction.output, plan.name, [], files)
    write_finished(correction.work / FINISHED, correction.identity, correction.output)
    measured = "" if before is None or after is None else f": held-out loss {before:.4f} before, {after:.4f} after"
    progress.message(f"corrected the teacher{measured}")


def with_corrected_teacher(loaded: LoadedPlan, correction: Correction) -> LoadedPlan:
    """Returns the plan with the corrected teacher as its teacher."""
    plan = loaded.training()
    teacher = plan.teacher.model_copy(update={"model": correction.plan.output, "revision": None})
    return replace(loaded, plan=plan.model_copy(update={"teacher": teacher}))


def _files(correction: Correction, before: float | None, after: float | None) -> Mapping[str, str]:
    """Returns the files that a corrected teacher has beside its weights."""
    plan = correction.plan
    told = f"Fine-tuned on {plan.trained_tokens:,} tokens of the distillation data."
    if before is not None and after is not None:
        told += f" Loss on held-out text: {before:.4f} nats a token before, {after:.4f} after."
    card = f"# {plan.name}: corrected teacher\n\n{told}\n"
    document = {
        "format_version": 1,
        "identity": correction.identity,
        "held_out_loss": {"before": before, "after": after},
    }
    return {CARD: card, CORRECTION: json.dumps(document, indent=1) + "\n"}
