"""The errors that a user can meet. Everything else that is raised is a bug of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minitron.specs.load import LoadedSpec


class MinitronError(Exception):
    """What the command line prints without a traceback. `exit_code` is what the process ends with."""

    exit_code = 1


class UsageError(MinitronError, ValueError):
    """The spec or the call is wrong, and the message says what to write instead."""

    exit_code = 2


class WorkError(MinitronError, RuntimeError):
    """The spec is right, the work failed: a bad checkpoint, a full disk, a check that did not pass."""


@dataclass(frozen=True)
class SpecError:
    """One thing that is wrong in a spec, at its place.

    `path` is the dotted path in the spec (`student.hidden_size`); `message` says what is wrong, `hint` what to write
    instead. `line` and `column` count from 1; 0 where there is no place (a value given by `--set`).
    """

    file: str
    line: int
    column: int
    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        where = f" {self.path}:" if self.path else ""
        return f"{place}:{where} {self.message}" + (f"; {self.hint}" if self.hint else "")


class SpecInvalid(UsageError):
    """All errors of one or more specs, in the order of their places.

    `draft` is what is left of a spec when everything that was found wrong is taken out: so the rest can be held against
    the teacher in the same go.
    """

    def __init__(self, errors: Sequence[SpecError], draft: LoadedSpec | None = None) -> None:
        assert errors, "SpecInvalid without an error"
        self.errors = sorted(errors, key=lambda e: (e.file, e.line, e.column, e.path))
        self.draft = draft
        super().__init__("\n".join(str(e) for e in self.errors))

    def __reduce__(self) -> tuple[type[SpecInvalid], tuple[list[SpecError]]]:
        """So that one process can hand it to another."""
        return SpecInvalid, (self.errors,)
