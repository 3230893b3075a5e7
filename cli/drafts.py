"""Reads a spec for a command that opens the teacher as well, so that all errors are reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from minitron.cli.failures import failure_of
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.data_files import data_sources
from minitron.specs.errors import MinitronError, SpecError, SpecInvalid
from minitron.specs.load import STAND_INS, InvalidDraft


def load_whole(path: Path, overrides: Sequence[str], *, compiles: bool = False) -> LoadedSpec:
    """Loads the spec. SpecInvalid with the spec's own mistakes and, for its valid parts, with every mismatch with its
    teacher and its data; `validate` reports the spec's own mistakes alone, without opening the teacher. With `compiles`
    also with what only a compile needs: data that is not there.
    """
    try:
        return load_spec(path, overrides)
    except InvalidDraft as error:
        found = [
            one
            for one in _against_the_teacher(error.draft, compiles=compiles)
            # (A default may stand where a wrong value stood, and is nobody's mistake.)
            if one.path not in {wrong.path for wrong in error.errors}
            and not any(f"{one.path}.".startswith(f"{at}.") for at in _taken_out(error))
        ]
        raise SpecInvalid([*error.errors, *found]) from None


def _taken_out(error: InvalidDraft) -> Iterator[str]:
    """Yields the dotted path of all data that is not the user's: it was wrong, and is missing from the draft or stood in
    for."""
    spec, stand_in = error.draft.spec, (STAND_INS["data"]["text"],)
    if spec.importance.data is None and any(one.path.partition(".")[0] == "importance" for one in error.errors):
        yield "importance.data"
    yield from (at for at, source in data_sources(spec) if source.text == stand_in)


def _against_the_teacher(draft: LoadedSpec, *, compiles: bool) -> Sequence[SpecError]:
    if draft.spec.teacher.model is None and draft.spec.teacher.spec is None:
        return ()
    from minitron.cli.libraries import quiet_libraries

    quiet_libraries()
    from minitron.compiler import make_plan

    try:
        # (A teacher that another spec makes may not be made yet: `run` makes it.)
        make_plan(draft, build=draft.build, weights=compiles and draft.spec.teacher.spec is None)
    except MinitronError as error:
        return failure_of(error).errors
    return ()
