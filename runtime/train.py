"""`minitron train BUILD`: the student learns from the teacher as training.yaml says; an interrupted training goes on where
it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from minitron.runtime.correction import corrected
from minitron.runtime.data import Data, data_hash
from minitron.runtime.hidden_states import remove_projection
from minitron.runtime.identity import WEIGHTS, require_same_training, resume_identity, weights_digest
from minitron.runtime.interrupt import interrupts
from minitron.runtime.loop import learn
from minitron.runtime.metrics import read_metrics
from minitron.runtime.models import DTYPES, model_folder
from minitron.runtime.output import Weights, whole_weights, write_model
from minitron.runtime.plan import LoadedPlan, read_training_plan
from minitron.runtime.setup import LOCK, Run, Session, needs_teacher, prepare, resume
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.world import World, join_world
from minitron.specs.atomic import remove_leftovers, write_text
from minitron.specs.builds import CHECKPOINTS, DATA_CACHE, FINISHED, METRICS
from minitron.specs.errors import UsageError, placing
from minitron.specs.locks import only_one
from minitron.specs.progress import Progress, Silent
from minitron.specs.training_plan import TrainingPlan


def train(build: Path, *, device: str | None, progress: Progress) -> None:
    """Trains what BUILD/training.yaml says and writes BUILD/model. Goes on from the last checkpoint where there is
    one, and does nothing where training is finished.

    UsageError (SpecInvalid with the place) for a plan that is wrong, or not that of the training that is under way;
    WorkError for broken files, a full disk, a loss that is not finite; KeyboardInterrupt after SIGINT or SIGTERM, a
    checkpoint written.
    """
    loaded = read_training_plan(build)
    plan = loaded.training()
    work = loaded.folder / plan.work
    with (
        placing(loaded),
        interrupts() as interrupt,
        join_world(device) as world,
        only_one(work, "training", active=world.leads, file=LOCK),
    ):
        _require_one_folder(work, world)
        if world.leads:
            _remove_leftovers(work, loaded.folder / plan.output)
        session = Session(
            world=world,
            encoder=TextEncoder.load(loaded.folder / plan.tokenizer),
            data=world.from_leader(lambda: Data.read(loaded.data("data", plan.data))),
            cache=work / DATA_CACHE,
            interrupt=interrupt,
            progress=progress if world.leads else Silent(),
        )
        _train(loaded, plan, session)


def _train(loaded: LoadedPlan, plan: TrainingPlan, session: Session) -> None:
    world, progress = session.world, session.progress
    work, output = loaded.folder / plan.work, loaded.folder / plan.output
    identity = resume_identity(plan, data_hash(session.data, session.encoder, plan.tokens))
    if (work / FINISHED).is_file() and output.is_dir():
        before = json.loads((work / FINISHED).read_text(encoding="utf-8"))["identity"]
        require_same_training(before, identity, work)
        progress.message(f"already trained: {output}; delete {work} to train from the beginning")
        return
    if plan.teacher_correction is not None and (begun := _identity_of_newest(work / CHECKPOINTS)) is not None:
        require_same_training(begun, identity, work)  # before a teacher is corrected for nothing
    if plan.teacher_logits == "online":  # else it was corrected, if it was, before it was captured
        loaded = corrected(loaded, session)
    run = prepare(session, loaded, identity | _teacher_weights(loaded, plan))
    state = resume(run, progress)
    with session.interrupt.deferring():
        learn(run, state, session.interrupt, progress)
    remove_projection(run.student)
    weights = whole_weights(run.student, DTYPES[plan.student.dtype], world)
    world.from_leader(lambda: _finish(loaded, run, weights))
    progress.message(f"trained: {output}")


def _teacher_weights(loaded: LoadedPlan, plan: TrainingPlan) -> dict[str, str]:
    """The weights of the teacher that runs beside the student: `layout` and folders may change on the way, the teacher may
    not. (Stored samples know theirs themselves, and so does a corrected teacher.)"""
    if plan.teacher_logits != "online" or plan.teacher_correction is not None or not needs_teacher(plan):
        return {}
    return {WEIGHTS: weights_digest(model_folder(loaded, "teacher", plan.teacher))}


def _identity_of_newest(checkpoints: Path) -> dict[str, Any] | None:
    """What the newest checkpoint remembers of its plan, its weights not looked at."""
    for state in sorted(checkpoints.glob("step-*/state.json"), reverse=True):
        try:
            return dict(json.loads(state.read_text(encoding="utf-8"))["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _require_one_folder(work: Path, world: World) -> None:
    """UsageError where some rank does not see what the leader writes: its part of a checkpoint would be lost."""
    world.wait()
    if world.any(not (work / LOCK).is_file()):
        raise UsageError(
            f"{work} is not the same folder on all machines; put the build on a file system that they share"
        )


def _remove_leftovers(work: Path, output: Path) -> None:
    """What processes left that were killed while they wrote data or the model."""
    remove_leftovers(work / "data")
    for folder in output.parent.glob(f".{output.name}.*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _finish(loaded: LoadedPlan, run: Run, weights: Weights) -> None:
    """The final model, and the note that this training is done."""
    plan = run.plan
    loss = f"{plan.loss.logits.divergence} to the teacher with weight {plan.loss.logits.weight:g}"
    if plan.loss.cross_entropy:
        loss += f", cross-entropy with weight {plan.loss.cross_entropy:g}"
    if run.hidden is not None:
        loss += f", {run.hidden.settings.distance} distance of hidden states"
    report = [f"Trained on {plan.steps * plan.step_tokens:,} tokens: {loss}."]
    if lines := [line for line in read_metrics(run.work / METRICS) if "held_out_loss" in line]:
        report.append(f"Loss on held-out text: {lines[-1]['held_out_loss']:.4f} nats a token.")
    source = model_folder(loaded, "student", plan.student)
    write_model(run.student, weights, source, loaded.folder / plan.output, plan.name, report)
    write_text(run.work / FINISHED, json.dumps({"format_version": 1, "identity": run.identity}, indent=1) + "\n")
