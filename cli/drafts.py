"""Reading a spec for a command that has a teacher at hand: what is wrong is told in one go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minitron.cli.failures import failure_of
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.builds import build_of
from minitron.specs.errors import MinitronError, SpecError, SpecInvalid
from minitron.specs.load import InvalidDraft


def load_whole(path: Path, overrides: Sequence[str]) -> LoadedSpec:
    """The spec. SpecInvalid with its own mistakes and, of what is right in it, with all that its teacher and its data say
    against it; `validate` is the command that says the first alone, and at once."""
    try:
        return load_spec(path, overrides)
    except InvalidDraft as error:
        raise SpecInvalid([*error.errors, *_against_the_teacher(error.draft)]) from None


def _against_the_teacher(draft: LoadedSpec) -> Sequence[SpecError]:
    if draft.spec.teacher.model is None and draft.spec.teacher.spec is None:
        return ()
    from minitron.cli.libraries import quiet_libraries

    quiet_libraries()
    from minitron.compiler import make_plan

    try:
        make_plan(draft, build=build_of(draft))
    except MinitronError as error:
        return failure_of(error).errors
    return ()
