"""Verifies a build folder as it lies there, long after the compile that wrote it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.build_documents import require_passed, write_verification
from minitron.compiler.compilation import Compilation, run_buffers
from minitron.compiler.compile import Stages, kept_coordinates, merge, refit, rotate
from minitron.compiler.compile import verify as run_verification
from minitron.compiler.out_of_memory import told_in_a_sentence
from minitron.compiler.plan.plan import Plan, settled, with_weights
from minitron.compiler.planning import make_plan
from minitron.compiler.score import score
from minitron.compiler.teacher.provenance import at_commit, observe, with_result
from minitron.compiler.teacher_checks import verify_teacher
from minitron.compiler.verify.checks import Check
from minitron.compiler.weights.source import open_weights
from minitron.specs.atomic import temporary_path
from minitron.specs.builds import PLAN, PROGRAM, REFITTED_AGAIN, SCORES, STUDENT, VERIFICATION, read_document
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
    with only_one(build, "verifying"):
        plan = with_weights(make_plan(loaded, build=build, weights=True), progress)
        if plan.needs_scores and plan.loaded.spec.importance.data is not None and not (build / SCORES).exists():
            raise UsageError(f"{build / SCORES} is missing; compile again")
        now = with_result(loaded, observe(at_commit(loaded, plan.checkpoint.commit)))
        for path, _, _ in changes(document["inputs"], now):
            raise UsageError(f"{' '.join(path)} is not what {build} was compiled from; compile again, or restore it")
        compiled = verified.get("compiled") or {}
        if plan.refits and compiled.get("device") not in (None, torch.device(device).type):
            raise UsageError(
                f"{build} was refitted on a device of the kind {compiled['device']}, on which the last digits depend; write "
                f"--device {compiled['device']}"
            )
        compilation = _open(plan, device, progress)
        try:
            with _threads(compiled.get("threads")), told_in_a_sentence(device, calibrates=False):
                checks = _checks(compilation, verified["student"])
            write_verification(build, checks, verified["student"], compiled)
        except OSError:  # a full disk, say: once that is mended, the refit goes on
            raise
        except Exception:
            shutil.rmtree(temporary_path(build / REFITTED_AGAIN), ignore_errors=True)
            raise
        shutil.rmtree(temporary_path(build / REFITTED_AGAIN), ignore_errors=True)
    require_passed(checks)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Computes in as many threads as the compile did: sums of a basis and of a refit are split among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spec_of_build(build: Path, document: Mapping[str, Any]) -> LoadedSpec:
    """Reads the spec that a build was compiled from. UsageError where its file has changed since."""
    spec = document["spec"]
    loaded = load_spec(Path(spec["path"]), spec["overrides"]).pinned(spec["pins"])
    if loaded.sha256 != spec["sha256"]:
        raise UsageError(f"{loaded.path} has changed since {build} was compiled from it; compile again, or restore it")
    return loaded


def _open(plan: Plan, device: str, progress: Progress) -> Compilation:
    """The state in which a compile begins."""
    source = open_weights(plan.teacher.captured, plan.checkpoint)
    return Compilation(plan, source, run_buffers(plan, plan.teacher.captured.config), device, progress)


def _checks(compilation: Compilation, recorded: Mapping[str, str]) -> list[Check]:
    """Makes the student again, without its files, and compares the build with it.

    A refit is made again: values that a compile had kept, with a hash of its own, would be compared with their own copy. It
    happens once, and what an interrupted verification has fitted is taken up by the next.
    """
    plan, stages = compilation.plan, Stages()
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
        compilation = refit(compilation, chosen, student, samples, plan.build / REFITTED_AGAIN)
    return [*of_teacher, *run_verification(compilation, student, samples, recorded=recorded)]
