"""The check of the folders that a training writes to: they are folders of the build, apart from everything that it
reads, and never overwrite files of somebody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from minitron.runtime.plan import LoadedPlan
from minitron.specs.atomic import claim_folder, require_replaceable
from minitron.specs.builds import (
    CHECKPOINTS,
    DATA_CACHE,
    FINISHED,
    LOGITS,
    METRICS,
    MLFLOW,
    TENSORBOARD,
    TRACKERS,
    WANDB,
)
from minitron.specs.errors import Problem, Refused
from minitron.specs.training_plan import EvaluationPlan, TrainingPlan

WORK_FILES = (CHECKPOINTS, DATA_CACHE, FINISHED, METRICS, TENSORBOARD, WANDB, MLFLOW, TRACKERS)
"""The names that a training writes in its work folder."""


def require_own_folders(loaded: LoadedPlan, *, outside: bool) -> None:
    """Checks the folders that training.yaml names for writing. Refused where one is, contains or lies in another folder
    of the build, or, unless `outside`, lies outside of the build.
    """
    if problems := list(folder_problems(loaded, outside=outside)):
        raise Refused(problems)


def claim_folders(loaded: LoadedPlan) -> None:
    """Marks the work folder as one of minitron's. UsageError where the work folder or an output belongs to somebody
    else.
    """
    plan = loaded.training()
    works, outputs = [plan.work], [plan.output]
    if plan.teacher_correction is not None:
        works, outputs = [*works, plan.teacher_correction.work], [*outputs, plan.teacher_correction.output]
    for output in outputs:
        require_replaceable(loaded.folder / output)
    for work in works:
        claim_folder(loaded.folder / work, WORK_FILES, "name another folder as `work`")


def folder_problems(loaded: LoadedPlan, *, outside: bool) -> Iterator[Problem]:
    """Yields the folders of the plan that cannot be written to under their names."""
    plan, build = loaded.plan, _real(loaded.folder)
    written = {"work": _real(loaded.folder / plan.work), "output": _real(loaded.folder / plan.output)}
    correction = plan.teacher_correction if isinstance(plan, TrainingPlan) else None
    if correction is not None:
        written["teacher_correction.work"] = _real(loaded.folder / correction.work)
        written["teacher_correction.output"] = _real(loaded.folder / correction.output)
    for at, path in written.items():
        if _within(build, path):
            yield Problem(
                at, f"{path} is the build itself or contains it", "write a folder of its own, such as the default"
            )
        elif not outside and not _within(path, build):
            hint = "write a folder inside it, or add --allow-outside"
            yield Problem(at, f"{path} lies outside of the build", hint)
        elif (other := next((name for name, read in _read(loaded, plan) if _meet(path, read)), None)) is not None:
            yield Problem(at, f"{path} and {other} contain one another", "write another folder")
    for at, path in written.items():
        for other, earlier in written.items():
            if other == at:
                break
            if _meet(path, earlier) and not (at == "teacher_correction.work" and _below(path, earlier)):
                yield Problem(at, f"{path} and the folder of `{other}` contain one another", "write another folder")


def _read(loaded: LoadedPlan, plan: EvaluationPlan) -> Iterator[tuple[str, Path]]:
    """Yields name and path of everything that a training reads: models, tokenizer, stored logits, data."""
    yield "the student", _real(loaded.folder / plan.student.model)
    yield "the tokenizer", _real(loaded.folder / plan.tokenizer)
    yield "the stored teacher logits", _real(loaded.folder / LOGITS)
    if (loaded.folder / plan.teacher.model).is_dir():
        yield "the teacher", _real(loaded.folder / plan.teacher.model)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _within(path: Path, folder: Path) -> bool:
    """Checks whether `path` is `folder` or lies in it."""
    return path == folder or folder in path.parents


def _meet(one: Path, other: Path) -> bool:
    return _within(one, other) or _within(other, one)


def _below(path: Path, work: Path) -> bool:
    """Checks whether `path` lies in the folder `work`, but not in a folder that training writes there."""
    return work in path.parents and not any(_within(path, work / name) for name in WORK_FILES)
