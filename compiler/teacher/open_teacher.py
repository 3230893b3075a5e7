"""Opens the model that a spec makes smaller: one from a folder or the Hub, or the result of another spec."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron.compiler.teacher.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from minitron.compiler.teacher.freshness import staleness
from minitron.compiler.teacher.hub import WrongRevision
from minitron.specs.builds import CONFIG, finished_note
from minitron.specs.chain import chain
from minitron.specs.errors import SpecInvalid
from minitron.specs.load import LoadedSpec


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
        return read_checkpoint(name, upper.result, weights=weights)
    if weights:
        message = f"`{name}` has no result yet: {reason}"
        hint = f"`minitron run {name}` first, or `minitron run {loaded.path.name}`, which runs both"
        raise SpecInvalid([loaded.error("teacher.spec", message, hint)])
    config = copy.deepcopy(planned(upper, upper.build))
    remark = f"the teacher is the student that {name} plans: {reason}"
    return Checkpoint(name, upper.result, config, {}, remark=remark)


def why_not_finished(loaded: LoadedSpec) -> str | None:
    """Explains why the result of a spec cannot be a teacher yet; None where it can: compiled from this spec and these
    inputs, verified, and trained where the spec trains."""
    build, result = loaded.build, loaded.result
    found = staleness(build, loaded)
    if found is not None and found.changed:  # a training plan that was edited by hand trains a teacher as well
        return f"{build} is {found.reason}"
    trained = loaded.spec.distill is None or finished_note(build).is_file()
    return None if trained and (result / CONFIG).is_file() else f"{build} is not trained to its end"
