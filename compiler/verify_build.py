"""Verifies a build folder as it lies there, long after the compile that wrote it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.build_documents import require_passed, write_verification
from minitron.compiler.compilation import Compilation, run_buffers
from minitron.compiler.compile import Stages, kept_coordinates, merge, refit, rotate
from minitron.compiler.compile import verify as run_verification
from minitron.compiler.emit.coordinates import same_coordinates
from minitron.compiler.emit.rewritten import RewrittenStudent
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.plan.plan import Plan, settled, with_weights
from minitron.compiler.planning import make_plan
from minitron.compiler.teacher.provenance import at_commit, observe, with_result
from minitron.compiler.verify.checks import Check, exactly
from minitron.compiler.verify.run import CHECKS
from minitron.compiler.verify.selection import first_mistake
from minitron.compiler.verify.written_weights import files_of, first_difference
from minitron.compiler.weights.source import open_weights
from minitron.specs.builds import COORDINATES, PLAN, PROGRAM, SCORES, STUDENT, VERIFICATION, read_document
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.file_hashes import folder_hashes
from minitron.specs.load import LoadedSpec, load_spec
from minitron.specs.lockfile import changes
from minitron.specs.locks import only_one
from minitron.specs.progress import Progress

Selection = Mapping[str, Sequence[Sequence[int]]]


def verify_build(build: Path, *, device: str, progress: Progress) -> None:
    """Runs every check of a compile on a build, and three that need no activations, and writes verification.json.

        files      student/ holds the files that the compile wrote, byte for byte
        coordinates  coordinates.safetensors, where there is one, has what the student keeps of the teacher's hidden states
        selection  plan.json keeps what scores.safetensors ranks highest
        weights    every element of every tensor in student/ is the teacher's that plan.json keeps

    Raises WorkError where a check fails, and UsageError where the build is not whole or where the spec, the teacher or the
    data are no longer those that it was compiled from.
    """
    document, verified = read_document(build / PLAN), read_document(build / VERIFICATION)
    if document is None or "selection" not in document or verified is None or "student" not in verified:
        raise UsageError(f"{build} was not compiled to its end; compile it first")
    for name in (STUDENT, PROGRAM):
        if not (build / name).exists():
            raise UsageError(f"{build / name} is missing; compile again")
    loaded = spec_of_build(build, document)
    with only_one(build, "verifying"), tempfile.TemporaryDirectory() as scratch:
        plan = with_weights(make_plan(loaded, build=build, weights=True), progress)
        if plan.needs_scores and plan.loaded.spec.importance.data is not None and not (build / SCORES).exists():
            raise UsageError(f"{build / SCORES} is missing; compile again")
        now = with_result(loaded, observe(at_commit(loaded, plan.checkpoint.commit)))
        for path, _, _ in changes(document["inputs"], now):
            raise UsageError(f"{' '.join(path)} is not what {build} was compiled from; compile again, or restore it")
        checks = [
            _files(build, verified["student"]),
            *_checks(plan, document["selection"], device, progress, Path(scratch)),
        ]
        write_verification(build, checks, verified["student"])
    require_passed(checks)


def spec_of_build(build: Path, document: Mapping[str, Any]) -> LoadedSpec:
    """Reads the spec that a build was compiled from. UsageError where its file has changed since."""
    spec = document["spec"]
    loaded = load_spec(Path(spec["path"]), spec["overrides"]).pinned(spec["pins"])
    if loaded.sha256 != spec["sha256"]:
        raise UsageError(f"{loaded.path} has changed since {build} was compiled from it; compile again, or restore it")
    return loaded


def _checks(plan: Plan, selection: Selection, device: str, progress: Progress, scratch: Path) -> list[Check]:
    """Makes the student anew in memory, up to the files, and compares the build with it."""
    source, stages = open_weights(plan.teacher.captured, plan.checkpoint), Stages()
    compilation = Compilation(plan, source, run_buffers(plan, plan.teacher.captured.config), device, progress)
    scores, samples = stages.score(compilation)
    chosen = stages.select(plan, scores)
    if plan.rotates:
        compilation, chosen = rotate(compilation, chosen, scores, samples)
    compilation = replace(compilation, plan=settled(plan, chosen))
    coordinates = _coordinates(compilation.build, kept_coordinates(compilation.plan, chosen, compilation.source))
    compilation = merge(compilation, chosen, scores)
    student = stages.rewrite(compilation.plan, chosen, compilation.buffers)
    if plan.refits:
        compilation = refit(compilation, student, samples, scratch)
    found = [coordinates, _selection(plan, selection, scores), _weights(compilation, student, selection)]
    return [*(one for one in found if one is not None), *run_verification(compilation, student, samples, CHECKS)]


def _files(build: Path, recorded: Mapping[str, str]) -> Check:
    """Compares the files of student/ with the hashes that the compile recorded."""
    there = folder_hashes(build / STUDENT)
    for name in sorted({*there, *recorded}):
        if there.get(name) != recorded.get(name):
            state = "missing" if name not in there else "new" if name not in recorded else "not what the compile wrote"
            return exactly("files", f"{STUDENT}/{name} is {state}", "")
    return exactly("files", None, "every file of student/ is what the compile wrote")


def _coordinates(build: Path, kept: torch.Tensor | None) -> Check | None:
    """Compares the coordinates that training reduces hidden states to with those of the student; None where it has none."""
    if not (build / COORDINATES).exists():
        return None
    same = kept is not None and same_coordinates(build / COORDINATES, kept)
    wrong = None if same else f"{COORDINATES} is not what the student keeps of the teacher's hidden states"
    return exactly("coordinates", wrong, "the coordinates of the hidden states are those that the student keeps")


def _selection(plan: Plan, selection: Selection, scores: ScoreTable) -> Check | None:
    """Compares plan.json with what the scores rank highest; None where another rule selects."""
    if plan.loaded.spec.importance.selection != "scores":
        return None
    found = first_mistake(
        selection, scores, plan.targets, plan.teacher.roles, plan.teacher.captured.layer_count,
        contiguous=plan.loaded.spec.importance.depth.contiguous, basis=plan.rotates,
    )  # fmt: skip
    return exactly("selection", found, "plan.json keeps what the scores rank highest")


def _weights(compilation: Compilation, student: RewrittenStudent, selection: Selection) -> Check | None:
    """Compares every element of student/ with the teacher's; None where transformers converts the names of the files."""
    captured, source = compilation.plan.teacher.captured, compilation.source
    if not source.streamed:
        return None

    def held(name: str) -> torch.Tensor:
        return source.get(name).to(captured.stored_dtype(name))

    repairs = {name: recipe for name, recipe in student.recipes.items() if recipe.scale != 1.0}
    try:
        written = files_of(compilation.build / STUDENT)
        found = first_difference(compilation.plan.teacher, held, selection, repairs, written)
    except WorkError as error:
        found = str(error)
    return exactly("weights", found, "every element of student/ is the teacher's that plan.json keeps")
