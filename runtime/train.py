"""Trains the student on the teacher as training.yaml says, and resumes a training that was interrupted: `minitron train
BUILD`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.runtime.checkpoint import identity_of_newest
from minitron.runtime.correction import corrected
from minitron.runtime.disk import writing
from minitron.runtime.finished import read_finished, write_finished
from minitron.runtime.float8 import require_float8
from minitron.runtime.folders import claim_folders, require_own_folders
from minitron.runtime.hidden_states import remove_projection
from minitron.runtime.identity import (
    COORDINATES,
    HELD_OUT,
    STUDENT,
    WEIGHTS,
    require_same_training,
    resume_identity,
    weights_digest,
)
from minitron.runtime.interrupt import interrupts
from minitron.runtime.loop import learn
from minitron.runtime.metrics import last_held_out_loss
from minitron.runtime.models import DTYPES, model_folder
from minitron.runtime.output import Weights, whole_weights, write_model
from minitron.runtime.plan import LoadedPlan, read_training_plan
from minitron.runtime.setup import Run, Session, prepare, resume
from minitron.runtime.verified import require_verified
from minitron.runtime.world import World, join_world, locked
from minitron.specs.atomic import remove_leftovers
from minitron.specs.builds import CHECKPOINTS, CONFIG, DATA_CACHE, FINISHED, METRICS
from minitron.specs.cache import tokens_folder
from minitron.specs.documents import content_hash
from minitron.specs.errors import Refused, UsageError, WorkError, placing
from minitron.specs.file_hashes import file_hash
from minitron.specs.locks import LOCK
from minitron.specs.progress import Progress
from minitron.specs.tracking import missing_trackers
from minitron.specs.training_plan import TrainingPlan, needs_teacher


def train(
    build: Path, *, device: str | None, progress: Progress, unverified: bool = False, outside: bool = False
) -> None:
    """Trains as BUILD/training.yaml says and writes BUILD/model. Resumes from the last checkpoint where there is one,
    and does nothing where training is finished. `unverified` accepts a student whose verification is missing or failed,
    `outside` lets `work` and `output` lie outside of the build.

    UsageError (SpecInvalid with the place) for a plan that is wrong, or not that of the training in progress; WorkError
    for broken files, a full disk, a loss that is not finite; KeyboardInterrupt, after a checkpoint is written, for a
    signal that asks the training to end.
    """
    loaded = read_training_plan(build)
    plan = loaded.training()
    work = loaded.folder / plan.work
    with placing(loaded), interrupts() as interrupt, join_world(device) as world:
        require_own_folders(loaded, outside=outside)
        if problems := list(missing_trackers(plan.track or (), "track")):
            raise Refused(problems)
        require_float8(plan, world.device)
        with locked(world, "training", loaded.folder, work):
            _require_one_folder(work, world)
            world.from_leader(lambda: _tidy_up(loaded, plan))
            session = Session.open(loaded, tokens_folder(loaded.folder, work), world, interrupt, progress)
            with session.closing:
                _train(loaded, plan, session, unverified=unverified)


def _train(loaded: LoadedPlan, plan: TrainingPlan, session: Session, *, unverified: bool) -> None:
    world, progress = session.world, session.progress
    work, output = loaded.folder / plan.work, loaded.folder / plan.output
    identity = resume_identity(plan, session.data_hash(plan))
    identity |= _contents(loaded, plan, session)
    if world.from_leader(lambda: _is_finished(work, output, identity, progress)):
        return
    if not unverified:
        world.from_leader(lambda: require_verified(loaded))
    if (begun := identity_of_newest(work / CHECKPOINTS)) is not None:
        require_same_training(begun, identity, work)  # before a teacher is corrected or models are loaded for nothing
    if plan.teacher_logits == "online":  # else it was corrected, if it was, before it was captured
        loaded = corrected(loaded, session)
    run = prepare(session, loaded, identity)
    state = resume(run, progress)
    with session.interrupt.deferring():
        learn(run, state, session.interrupt, progress)
    remove_projection(run.student)
    weights = whole_weights(run.student, DTYPES[plan.student.dtype], world)
    world.from_leader(lambda: _finish(loaded, run, weights))
    progress.message(f"trained: {output}")


def _tidy_up(loaded: LoadedPlan, plan: TrainingPlan) -> None:
    """Marks the folders that training writes to, and removes files that killed processes left in them."""
    output = loaded.folder / plan.output
    with writing(str(loaded.folder / plan.work)):
        claim_folders(loaded)
    remove_leftovers(loaded.folder / plan.work / DATA_CACHE)  # that of this build alone, which is locked
    remove_leftovers(output.parent, output.name)


def _is_finished(work: Path, output: Path, identity: Mapping[str, Any], progress: Progress) -> bool:
    """Checks whether the training is finished and its model intact. Refused where another training is finished there;
    WorkError where the model is broken and no checkpoint is left to write it from.
    """
    if not (work / FINISHED).exists():
        return False
    finished = read_finished(work / FINISHED)
    broken: str | None = f"{FINISHED} cannot be read"
    if finished is not None:
        require_same_training(finished.identity, identity, work)
        broken = finished.damage(output)
    if broken is None:
        progress.message(f"already trained: {output}; delete {work} to train from the beginning")
        return True
    if identity_of_newest(work / CHECKPOINTS) is None:
        raise WorkError(
            f"{output} is broken ({broken}), and {work} has no checkpoint to write it again from; delete {work} to train "
            "from the beginning"
        )
    progress.message(f"{output} is broken ({broken}): it is written again from the last checkpoint")
    return False


def _contents(loaded: LoadedPlan, plan: TrainingPlan, session: Session) -> dict[str, str]:
    """Returns hashes of everything that a training reads beside its data: `layout` and folders may change during a
    training, the contents may not.
    """
    found: dict[str, str] = {}
    student = loaded.folder / plan.student.model
    if (student / CONFIG).is_file():
        found[STUDENT] = weights_digest(student)
    # (Stored samples know their teacher themselves, and so does a corrected teacher.)
    if plan.teacher_logits == "online" and plan.teacher_correction is None and needs_teacher(plan):
        found[WEIGHTS] = weights_digest(model_folder(loaded, "teacher", plan.teacher))
    if plan.kept_coordinates is not None and (loaded.folder / plan.kept_coordinates).is_file():
        found[COORDINATES] = file_hash(loaded.folder / plan.kept_coordinates)
    if (held_out := plan.held_out) is not None:
        data = held_out.data
        found[HELD_OUT] = session.world.from_leader(lambda: content_hash(loaded.data("held_out.data", data)))
    return found


def _require_one_folder(work: Path, world: World) -> None:
    """Checks that all ranks see the folder that the leader writes to. UsageError where one does not: its part of a
    checkpoint would be lost.
    """
    world.wait()
    if world.any(not (work / LOCK).is_file()):
        raise UsageError(
            f"{work} is not the same folder on all machines; put the build on a file system that they share"
        )


def _finish(loaded: LoadedPlan, run: Run, weights: Weights) -> None:
    """Writes the final model, and the note that this training is finished."""
    plan = run.plan
    loss = f"{plan.loss.logits.divergence} to the teacher with weight {plan.loss.logits.weight:g}"
    if plan.loss.cross_entropy:
        loss += f", cross-entropy with weight {plan.loss.cross_entropy:g}"
    if run.hidden is not None:
        loss += f", {run.hidden.settings.distance} distance of hidden states"
    report = [f"Trained on {plan.trained_tokens:,} tokens: {loss}."]
    if (measured := last_held_out_loss(run.work / METRICS)) is not None:
        report.append(f"Loss on held-out text: {measured:.4f} nats a token.")
    source = model_folder(loaded, "student", plan.student)
    write_model(run.student, weights, source, loaded.folder / plan.output, plan.name, report)
    with writing(str(run.work)):
        write_finished(run.work / FINISHED, run.identity, loaded.folder / plan.output)
