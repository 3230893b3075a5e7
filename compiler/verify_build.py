"""Verifies a build folder as it lies there, long after the compile that wrote it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron.compiler.build_documents import require_passed, write_verification
from minitron.compiler.compilation import Compilation, run_buffers
from minitron.compiler.compile import Stages, kept_coordinates, merge, refit, rotate
from minitron.compiler.compile import verify as run_verification
from minitron.compiler.plan.plan import Plan, settled, with_weights
from minitron.compiler.planning import make_plan
from minitron.compiler.score import score
from minitron.compiler.teacher.provenance import at_commit, observe, with_result
from minitron.compiler.teacher_checks import verify_teacher
from minitron.compiler.verify.checks import Check
from minitron.compiler.weights.source import open_weights
from minitron.specs.builds import PLAN, PROGRAM, SCORES, STUDENT, VERIFICATION, read_document
from minitron.specs.errors import UsageError
from minitron.specs.load import LoadedSpec, load_spec
from minitron.specs.lockfile import changes
from minitron.specs.locks import only_one
from minitron.specs.progress import Progress


def verify_build(build: Path, *, device: str, progress: Progress) -> None:
    """Runs every check of a compile on a build and writes verification.json.

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
        checks = _checks(plan, verified["student"], device, progress, Path(scratch))
        write_verification(build, checks, verified["student"])
    require_passed(checks)


def spec_of_build(build: Path, document: Mapping[str, Any]) -> LoadedSpec:
    """Reads the spec that a build was compiled from. UsageError where its file has changed since."""
    spec = document["spec"]
    loaded = load_spec(Path(spec["path"]), spec["overrides"]).pinned(spec["pins"])
    if loaded.sha256 != spec["sha256"]:
        raise UsageError(f"{loaded.path} has changed since {build} was compiled from it; compile again, or restore it")
    return loaded


def _checks(plan: Plan, recorded: Mapping[str, str], device: str, progress: Progress, scratch: Path) -> list[Check]:
    """Makes the student again in memory, without its files, and compares the build with it."""
    source, stages = open_weights(plan.teacher.captured, plan.checkpoint), Stages()
    compilation = Compilation(plan, source, run_buffers(plan, plan.teacher.captured.config), device, progress)
    of_teacher = verify_teacher(compilation)
    scores, samples = score(compilation, made_anyhow=True)
    chosen = stages.select(plan, scores)
    if plan.rotates:
        compilation, chosen = rotate(compilation, chosen, scores, samples)
    plan = settled(plan, chosen)
    kept = kept_coordinates(plan, chosen, compilation.source)
    compilation = replace(compilation, plan=plan, scores=replace(scores, covariance={}), coordinates=kept)
    compilation = merge(compilation, chosen, scores)
    student = stages.rewrite(compilation.plan, chosen, compilation.buffers)
    if plan.refits:
        compilation = refit(compilation, student, samples, scratch)
    return [*of_teacher, *run_verification(compilation, student, samples, recorded=recorded)]
