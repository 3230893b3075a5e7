"""The `files` check: student/ holds the files that its compile wrote, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minitron.compiler.verify.checks import Check, exactly
from minitron.compiler.verify.routes import Routes
from minitron.specs.builds import STUDENT
from minitron.specs.file_hashes import folder_hashes


def files(routes: Routes) -> Check | None:
    """Compares with the hashes that the compile recorded; None while it has not yet."""
    if routes.subject.recorded is None:
        return None
    mistake = first_other_file(routes.subject.build / STUDENT, routes.subject.recorded)
    return exactly("files", mistake, "every file of student/ is what the compile wrote")


def first_other_file(folder: Path, recorded: Mapping[str, str]) -> str | None:
    """The first file that is missing, new or another one, in words."""
    there = folder_hashes(folder)
    for name in sorted({*there, *recorded}):
        if there.get(name) != recorded.get(name):
            state = "missing" if name not in there else "new" if name not in recorded else "not what the compile wrote"
            return f"{STUDENT}/{name} is {state}"
    return None
