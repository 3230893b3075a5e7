"""Opens the model that a spec makes smaller: one from a folder or the Hub, or the result of another spec."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron.compiler.teacher.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from minitron.compiler.teacher.hub import WrongRevision
from minitron.compiler.teacher.provenance import observe, with_result
from minitron.specs.builds import CONFIG, PLAN, STUDENT, VERIFICATION, build_of, finished_note, read_document, result_of
from minitron.specs.chain import chain
from minitron.specs.errors import MinitronError, SpecInvalid
from minitron.specs.file_hashes import first_difference
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import changes, in_words


def open_teacher(loaded: LoadedSpec, *, weights: bool, planned: Callable[[LoadedSpec, Path], Any]) -> Checkpoint:
    """Opens the teacher of a spec. With `weights` they must be there, or on the Hub (see `open_checkpoint`).

    In a chain the teacher is the model of the spec above. Where that has not been run, a plan does with what it will be:
    `planned(spec above, its build folder)` gives the configuration of its student. SpecInvalid at the teacher's line.
    """
    teacher = loaded.spec.teacher
    specs = chain(loaded)
    if specs:
        return _result(loaded, specs[-1], weights=weights, planned=planned)
    assert teacher.model is not None, "a rule of the language: a spec names a model or a spec"
    try:
        return open_checkpoint(
            teacher.model, teacher.revision, loaded.folder, weights=weights, tower=teacher.tower is not None
        )
    except WrongRevision as error:
        raise SpecInvalid([loaded.error("teacher.revision", str(error))]) from None


def _result(
    loaded: LoadedSpec, upper: LoadedSpec, *, weights: bool, planned: Callable[[LoadedSpec, Path], Any]
) -> Checkpoint:
    name = loaded.spec.teacher.spec
    assert name is not None
    reason = why_not_finished(upper)
    if reason is None:
        return read_checkpoint(name, result_of(upper), weights=weights)
    if weights:
        message = f"`{name}` has no result yet: {reason}"
        hint = f"`minitron run {name}` first, or `minitron run {loaded.path.name}`, which runs both"
        raise SpecInvalid([loaded.error("teacher.spec", message, hint)])
    config = copy.deepcopy(planned(upper, build_of(upper)))
    remark = f"the teacher is the student that {name} plans: {reason}"
    return Checkpoint(name, result_of(upper), config, {}, remark=remark)


def why_not_finished(loaded: LoadedSpec) -> str | None:
    """Explains why the result of a spec cannot be a teacher yet; None where it can: compiled from this spec and these
    inputs, verified, and trained where the spec trains."""
    build, result = build_of(loaded), result_of(loaded)
    reason = why_stale(build, loaded)
    if reason is not None:
        return f"{build} is {reason}"
    trained = loaded.spec.distill is None or finished_note(build).is_file()
    return None if trained and (result / CONFIG).is_file() else f"{build} is not trained to its end"


def why_stale(build: Path, loaded: LoadedSpec) -> str | None:
    """Explains why a build folder is not what a spec compiles to now, as `{build} is ...`; None where it is, and
    verified."""
    plan = read_document(build / PLAN)
    if plan is None:
        return "not compiled yet"
    if (plan.get("spec") or {}).get("sha256") != loaded.sha256:
        return "compiled from another version of the spec"
    inputs = plan.get("inputs")
    if isinstance(inputs, dict):
        try:
            now = with_result(loaded, observe(loaded))
        except MinitronError:
            now = inputs  # what is not there (any more) is for the plan to say
        for path, before, after in changes(inputs, now):
            words = in_words(before, after).replace("locked at", "built from")
            return f"compiled from other inputs: {' '.join(path)} {words}"
    verification = read_document(build / VERIFICATION)
    if verification is None:
        return "not compiled to its end"
    if verification.get("passed") is not True:
        return "compiled, and its verification did not pass"
    student = verification.get("student")
    changed = first_difference(build / STUDENT, student) if isinstance(student, dict) else "its files are not recorded"
    return None if changed is None else f"compiled, and its student is not what was verified: {changed}"
