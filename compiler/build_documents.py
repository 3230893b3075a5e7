"""Writes what a build says about itself: plan.json and training.yaml, both or neither, and never over a training of
something else."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.emit.coordinates import write_coordinates
from minitron.compiler.emit.training_plan import aligned, fitted, render, training_plan
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.importance.select import Selection
from minitron.compiler.plan.plan import Plan, settled
from minitron.compiler.plan_document import plan_document, student_widths
from minitron.compiler.roles.names import HIDDEN, LAYERS
from minitron.compiler.teacher.freshness import Staleness
from minitron.compiler.verify.checks import Check, failed
from minitron.specs.atomic import kept_folder, remove_leftovers, sync_folder, temporary_path, write_text
from minitron.specs.builds import (
    CHECKPOINTS,
    COORDINATES,
    FINISHED,
    METRICS,
    MODEL,
    PLAN,
    PROGRAM,
    SEARCH,
    STAGED,
    STUDENT,
    TRAINING,
    VERIFICATION,
    WORK,
    begun_identity,
    read_document,
)
from minitron.specs.errors import Problem, SpecInvalid, UsageError, WorkError, located
from minitron.specs.hand_edits import hand_edits, in_short, with_mark
from minitron.specs.lockfile import Inputs
from minitron.specs.one_line import plain
from minitron.specs.search_files import read_ranking, read_search
from minitron.specs.training_plan import EvaluationPlan, StartPlan, TrainingPlan, deciding_settings, to_document

_WAY_ON = "name another folder with -o, or add --fresh, which moves this build aside"
# What a compile replaces in a build, verification.json last: without it a build is not compiled to its end.
_PUBLISHED = (STUDENT, PROGRAM, COORDINATES, TRAINING, PLAN, VERIFICATION)


# --- what can refuse, asked before anything is written ---


def guard_build(plan: Plan, found: Staleness | None) -> None:
    """Refuses a compile that would contradict what is in the build: its training, or a training plan that was edited
    by hand. UsageError, SpecInvalid with every setting that differs; nothing has been written then.
    """
    build = plan.build
    old = read_document(build / PLAN)
    if old is None:
        return
    if is_training(build) and (old.get("student") or {}).get("widths") != _as_json(student_widths(plan)):
        raise UsageError(f"{build} holds the training of another student (other widths); {_WAY_ON}")
    selection = old.get("selection") or {}
    layers = (selection.get(LAYERS) or [[]])[0]
    plan = replace(plan, layers=tuple(layers)) if len(layers) == plan.targets.layers else plan
    written = _training_plan(plan, str(old.get("fingerprint")), HIDDEN in selection)
    if isinstance(written, TrainingPlan) and (begun := begun_identity(build)) is not None:
        _guard_settings(plan, written, begun)
    edits = hand_edits(build, old)
    lost = [edit for edit in edits if _at(to_document(written), edit.path) != edit.written]
    if lost:
        why = "the spec changed as well" if found is not None and found.changed else "it would be generated again"
        raise UsageError(
            f"{build / TRAINING} was edited by hand ({in_short(tuple(lost))}), and {why}; write the values into "
            f"{plan.loaded.path.name}, or remove {TRAINING} to drop them, or {_WAY_ON}"
        )


def guard_training(build: Path, fingerprint: str) -> None:
    """Refuses to overwrite a build that holds the training of another student."""
    old = read_document(build / PLAN)
    if old is not None and is_training(build) and old.get("fingerprint") != fingerprint:
        raise UsageError(
            f"{build} holds the training of another student (other widths, selection or teacher); {_WAY_ON}"
        )


def is_training(build: Path) -> bool:
    """Checks whether the training of a build's student has begun; tokenized data and a corrected teacher do not count."""
    return any((build / WORK / name).exists() for name in (METRICS, CHECKPOINTS, FINISHED)) or (build / MODEL).exists()


def _guard_settings(plan: Plan, written: TrainingPlan, begun: Mapping[str, Any]) -> None:
    problems = []
    for key, now in deciding_settings(written).items():
        before, (first, _, _) = begun.get(key, now), key.partition(".")
        if before == now or first in ("fingerprint", "student", "start") or key.startswith("teacher.head"):
            continue
        path = key if first in ("teacher", "teacher_correction") else f"distill.{key}"
        message = f"was {plain(before)} when the training in {plan.build} began, and is now {plain(now)}"
        problems.append(Problem(path, message, f"write {plain(before)} again, {_WAY_ON}"))
    if problems:
        raise SpecInvalid(located(problems, plan.loaded))


def _at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


# --- writing ---


@dataclass(frozen=True)
class Trained:
    """The student that a training plan is for: its fingerprint, what it was made from, and the state that the rungs of a
    search left of it."""

    fingerprint: str
    inputs: Inputs
    start: StartPlan | None = None


def write_documents(
    folder: Path, plan: Plan, selection: Selection, student: Trained, kept: torch.Tensor | None
) -> None:
    """Writes plan.json, training.yaml and, where the training reduces hidden states to the `kept` coordinates,
    coordinates.safetensors into `folder`, for the build of the plan."""
    written = _training_plan(plan, student.fingerprint, kept is not None, student.start)
    write_coordinates(folder / COORDINATES, kept if getattr(written, "kept_coordinates", None) else None)
    document = plan_document(plan, selection)
    _write_both(folder, plan, written, document | {"fingerprint": student.fingerprint, "inputs": student.inputs})


def renew_documents(plan: Plan, inputs: Inputs) -> bool:
    """Writes plan.json and training.yaml again for a build whose student is what the plan asks for. False, with nothing
    written, where more is needed: coordinates of hidden states that the compile did not keep, or another candidate of a
    search."""
    old = read_document(plan.build / PLAN)
    assert old is not None
    if plan.search is not None and old["student"]["widths"] != _as_json(student_widths(plan)):
        return False
    selection, fingerprint = old["selection"], str(old["fingerprint"])
    plan = settled(plan, Selection(tuple(selection[LAYERS][0])))
    written = _training_plan(plan, fingerprint, HIDDEN in selection, search_start(plan, fingerprint))
    if getattr(written, "kept_coordinates", None) and not (plan.build / COORDINATES).is_file():
        return False
    document = plan_document(plan) | {"selection": selection, "fingerprint": fingerprint, "inputs": inputs}
    _write_both(plan.build, plan, written, document)
    return True


def search_start(plan: Plan, fingerprint: str) -> StartPlan | None:
    """Returns the state that the rungs of a search left of this student; None for a candidate that did not come through.

    Raises WorkError where the student is another one than the rungs trained.
    """
    ranking, file = read_ranking(plan.build), read_search(plan.build)
    number = None if plan.search is None else plan.search["candidate"]
    if ranking is None or file is None or number is None or ranking.winner != number or not file.rungs:
        return None
    (entry,) = [one for one in file.candidates if one.number == number]
    if entry.fingerprint != fingerprint:
        raise WorkError(
            f"the student that was compiled is not the one that {plan.build / SEARCH} trained; remove that folder to "
            "search again"
        )
    distill = plan.loaded.spec.distill
    assert distill is not None, "a search distils"
    step = -(-file.rungs[-1].tokens // (distill.batch * distill.sequence_length))
    return StartPlan(checkpoints=f"{SEARCH}/{entry.folder}/{CHECKPOINTS}", step=step)


def _training_plan(
    plan: Plan, fingerprint: str, narrows_hidden: bool, start: StartPlan | None = None
) -> EvaluationPlan:
    estimate = Estimate(plan)
    written = training_plan(
        plan.loaded, plan.build, plan.checkpoint, plan.heads, plan.teacher.captured.layer_path, fingerprint,
        {"teacher": estimate.teacher_costs, "student": estimate.student_costs},
    )  # fmt: skip
    if plan.loaded.spec.distill is not None:
        written = fitted(written, estimate.recomputation, estimate.micro_batches)
    written = aligned(written, plan.layers, COORDINATES if narrows_hidden else None)
    return written.model_copy(update={"start": start}) if isinstance(written, TrainingPlan) else written


def _write_both(folder: Path, plan: Plan, written: EvaluationPlan, document: Mapping[str, Any]) -> None:
    """Writes plan.json, which holds training.yaml as it was generated, and then training.yaml: whoever finds the second
    missing or older knows that it was not edited but not written."""
    write_text(folder / PLAN, as_text({**document, "training": to_document(written)}))
    write_text(folder / TRAINING, with_mark(render(written, plan.loaded.path, plan.build)))


def training_text(plan: Plan, fingerprint: str) -> str:
    """Returns training.yaml for a plan, for experiments that train something else than a build was compiled for."""
    return with_mark(render(_training_plan(plan, fingerprint, narrows_hidden=False), plan.loaded.path, plan.build))


def compiled_on(device: str) -> dict[str, Any]:
    """Returns what of this machine decides the last digits of a basis and of a refit, as verification.json keeps it."""
    return {"device": torch.device(device).type, "threads": torch.get_num_threads()}


def write_verification(
    build: Path, checks: Sequence[Check], student: Mapping[str, str], compiled: Mapping[str, Any]
) -> None:
    """Writes verification.json; `student` has the hash of every file of student/, `compiled` is what it was `compiled_on`."""
    document = {
        "format_version": 1,
        "passed": not failed(checks),
        "checks": [check.to_json() for check in checks],
        "student": dict(student),
        "compiled": dict(compiled),
    }
    write_text(build / VERIFICATION, as_text(document))


def require_passed(checks: Sequence[Check]) -> None:
    """Raises WorkError where a check failed."""
    if failed(checks):
        raise WorkError(
            f"the student failed its check {failed(checks)[0]}; verification.json has all of them. "
            "Please report this: the student must not be used"
        )


@contextlib.contextmanager
def staged(build: Path, made_for: str) -> Iterator[Path]:
    """Yields a folder inside the build, whose contents replace those of the build when all of them are there. On error
    the build stays as it was. `made_for` identifies what is written: where a process that was killed or interrupted has
    written the same, what it completed is still in the folder."""
    folder = kept_folder(build / STAGED, made_for)
    remove_leftovers(folder, but=(STUDENT,))
    try:
        yield folder
        (build / VERIFICATION).unlink(missing_ok=True)
        for name in _PUBLISHED:
            _replace(folder / name, build / name)
        sync_folder(build)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _replace(new: Path, target: Path) -> None:
    """Puts a file or folder in the place of an older one; removes the older one where there is no new one."""
    if target.is_dir() and not target.is_symlink():
        target.replace(aside := temporary_path(target, "old"))
        shutil.rmtree(aside, ignore_errors=True)
    if new.exists():
        new.replace(target)
    else:
        target.unlink(missing_ok=True)


def as_text(document: Any) -> str:
    """Returns a document as the text of a JSON file."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
