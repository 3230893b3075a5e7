"""Resolves chains: a spec whose teacher is the result of another spec (`teacher.spec`), which may itself be such a
spec."""

from __future__ import annotations

import os
from pathlib import Path

from minitron.specs.errors import SpecInvalid
from minitron.specs.load import LoadedSpec, load_spec
from minitron.specs.lockfile import with_lock


def above(loaded: LoadedSpec) -> LoadedSpec | None:
    """Loads the spec whose result is the teacher, with its own lock if there is one; None if the teacher is a model.

    SpecInvalid at `teacher.spec` if the file does not exist, and at the other file's own places if that spec is wrong.
    """
    name = loaded.spec.teacher.spec
    if name is None:
        return None
    path = Path(os.path.normpath(loaded.folder / name))
    if not path.is_file():
        what = f"`{name}` is a folder" if path.is_dir() else f"there is no file `{name}`"
        raise SpecInvalid([loaded.error("teacher.spec", what, "write the path of a spec, relative to this file")])
    return with_lock(load_spec(path))


def chain(loaded: LoadedSpec) -> tuple[LoadedSpec, ...]:
    """Returns the specs that have to run before this one, in order: the spec whose teacher is a model comes first.

    SpecInvalid at the `teacher.spec` that leads back to an earlier spec; other errors as for `above`.
    """
    specs: list[LoadedSpec] = []
    seen = [os.path.realpath(loaded.path)]
    below = loaded
    while (upper := above(below)) is not None:
        real = os.path.realpath(upper.path)
        if real in seen:
            message = f"`{below.spec.teacher.spec}` comes back to a spec that takes its teacher from this one"
            hint = "write `model` in one of them: the first teacher of a chain is a model"
            raise SpecInvalid([below.error("teacher.spec", message, hint)])
        seen.append(real)
        specs.insert(0, upper)
        below = upper
    return tuple(specs)
