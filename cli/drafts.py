"""Reads a spec for a command that opens the teacher as well, so that all errors are reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minitron.cli.failures import failure_of
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.builds import build_of
from minitron.specs.errors import MinitronError, SpecError, SpecInvalid
from minitron.specs.load import InvalidDraft


def load_whole(path: Path, overrides: Sequence[str]) -> LoadedSpec:
    """Loads the spec. SpecInvalid with the spec's own mistakes and, for its valid parts, with every mismatch with its
    teacher and its data; `validate` reports the spec's own mistakes alone, without opening the teacher.
    """
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
