"""Reads a build folder: the documents that exist, and their contents."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import asdict
from pathlib import Path

import yaml

from minitron.cli.render import say
from minitron.cli.sections import Document
from minitron.specs import LoadedSpec
from minitron.specs.atomic import remove_leftovers
from minitron.specs.builds import (
    LOGITS,
    MODEL,
    PLAN,
    RESULTS,
    SEARCH,
    STUDENT,
    TEACHER,
    TOWER,
    TRAINING,
    VERIFICATION,
    WORK,
    finished_note,
    metrics_file,
    read_document,
)
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.json_files import json_lines
from minitron.specs.locks import only_one

# The folders of a build that minitron writes and replaces.
_PARTS = {LOGITS, MODEL, SEARCH, STUDENT, TEACHER, TOWER, WORK}


def require_build(build: Path) -> Path:
    """Returns `build` where it is a build folder; UsageError with the command that makes one where it is not."""
    if not build.exists():
        raise UsageError(f"{build}: no such build folder; `minitron compile SPEC -o {build}` makes one")
    if not build.is_dir():
        raise UsageError(f"{build}: a file, not a build folder; give the folder that `minitron compile` has written")
    if not any((build / name).is_file() for name in (PLAN, TRAINING)):
        raise UsageError(
            f"{build}: not a build folder, it has neither {PLAN} nor {TRAINING}; "
            f"give the folder that `minitron compile` has written"
        )
    return build


def require_training_plan(build: Path) -> Path:
    """Returns `build` where it has something to train; UsageError with the remedy where it has not."""
    if not (require_build(build) / TRAINING).is_file():
        raise UsageError(f"{build}: has no {TRAINING}, its spec has no `distill` block; add one and compile again")
    return build


def build_folder(output: Path | None, loaded: LoadedSpec) -> Path:
    """Returns the folder that a spec is compiled into: `output`, or builds/NAME beside the spec. UsageError where
    something else is there.
    """
    build = output or loaded.build
    if build.exists() and not build.is_dir():
        raise UsageError(f"{build}: a file, and the build needs a folder; name another with -o")
    whole = build.absolute().resolve()
    for above in whole.parents:
        if above.is_file():
            raise UsageError(f"{build}: {above} is a file, and no folder can lie in it; name another with -o")
        if (above / PLAN).is_file() and whole.relative_to(above).parts[0] in _PARTS:
            raise UsageError(f"{build}: lies inside of the build {above}, whose files these are; name another with -o")
    teacher = None if loaded.spec.teacher.model is None else (loaded.folder / loaded.spec.teacher.model).expanduser()
    if teacher is not None and teacher.is_dir() and whole == teacher.resolve():
        raise UsageError(f"{build}: is the teacher's folder; name another with -o")
    return build


def move_aside(build: Path) -> None:
    """Moves a build that exists to the first free of BUILD.1, BUILD.2, ...; nothing is deleted. UsageError where a
    process is at work in it.
    """
    if not build.exists():
        return
    require_build(build)
    with only_one(build, "moving"), only_one(build / WORK, "moving", active=(build / WORK).is_dir()):
        target = next(path for n in itertools.count(1) if not (path := build.with_name(f"{build.name}.{n}")).exists())
        build.rename(target)
    say(f"{build}: moved to {target}")


def tidy(build: Path) -> None:
    """Removes what a killed process left in a build that is whole; nothing while another process is at work there."""
    with contextlib.suppress(UsageError, WorkError), only_one(build, "tidying"):
        remove_leftovers(build)


def edits_of(build: Path, plan: Document | None) -> list[Document]:
    """Returns the values of training.yaml that were edited by hand: path, as generated, as written."""
    from minitron.specs.hand_edits import hand_edits

    return [asdict(edit) for edit in hand_edits(build, plan)] if plan else []


def is_trained(build: Path) -> bool:
    """Checks whether training of `build` is finished and the trained model exists."""
    return finished_note(build).is_file() and (build / MODEL).is_dir()


def training_progress(build: Path) -> Document | None:
    """Returns `{total_tokens, steps, first, last}` of the training so far; None where none has begun.

    `first` and `last` are records of train/metrics.jsonl, `total_tokens` is what training.yaml asks for.
    """
    first: Document | None = None
    last: Document = {}
    steps = 0
    for record in json_lines(metrics_file(build)):
        first = record if first is None else first
        last = record
        steps += 1
    if first is None:
        return None
    return {
        "total_tokens": total_tokens(build / TRAINING),
        "steps": last.get("step", steps),
        "first": first,
        "last": last,
    }


def show_document(build: Path) -> Document:
    """Collects all that is known about a build: `build`, `plan`, `edited`, `training`, `verification`, `results`; null for
    missing ones.
    """
    plan = read_document(build / PLAN)
    return {
        "build": str(build),
        "plan": plan,
        "edited": edits_of(build, plan),
        "training": training_progress(build),
        "verification": read_document(build / VERIFICATION),
        "results": read_document(build / RESULTS),
    }


def total_tokens(path: Path) -> int | None:
    """Reads the number of tokens that a training plan asks for; None where there is no plan, or one for evaluation
    alone.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    tokens = content.get("tokens") if isinstance(content, dict) else None
    return tokens if isinstance(tokens, int) else None
