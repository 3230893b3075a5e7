"""Notices data files that change while their documents are read.

Tokens are known by a hash of the files that is taken before; those of a file that changes later would lie under the hash of
another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from minitron.specs.data import Source
from minitron.specs.data_files import data_files
from minitron.specs.documents.kinds import Tally
from minitron.specs.errors import WorkError

Marks: TypeAlias = Mapping[str, Sequence[int]]
"""File -> its size and the second of its last change: some file systems forget fractions of it when a file leaves their
cache."""


def marks_of(source: Source) -> Marks:
    """Returns what the files of a resolved source look like now, as far as they are there: not every machine need have
    them.
    """
    return {str(file): mark for file in data_files(source) if (mark := _mark(file)) is not None}


def require_unchanged(marks: Marks, tally: Tally) -> None:
    """Checks the files that are being read, and those that were read since the last check. WorkError for one that does not
    look as in `marks` any more.
    """
    for file in (*tally.open, *tally.closed):
        if (before := marks.get(str(file))) is not None and list(before) != _mark(file):
            raise WorkError(
                f"{file} has changed while its text was turned into tokens; let the data rest and run the command again"
            )
    tally.closed.clear()


def _mark(file: Path) -> list[int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_size, int(found.st_mtime)]
