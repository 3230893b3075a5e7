"""The errors that a user can meet. Every other exception is a bug of minitron."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from minitron.specs.one_line import message_text, one_line


class MinitronError(Exception):
    """An error that the command line prints without a traceback. `exit_code` is the exit status of the process."""

    exit_code = 1
    follows = False
    """True where the error may be only a consequence of another process's failure."""


class UsageError(MinitronError, ValueError):
    """An error in the spec or the call; the message says what to write instead."""

    exit_code = 2


class WorkError(MinitronError, RuntimeError):
    """A failure of the work under a correct spec: a bad checkpoint, a full disk, a check that did not pass."""


class OtherProcessEnded(WorkError):
    """The failure of a process that trains beside this one."""

    follows = True


class ProcessesFailed(MinitronError):
    """The failure of processes that this one has started; they have said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the processes that were started have failed, and say why")
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault at a dotted path of a spec or of training.yaml; `hint` says what to write instead.

    Checks yield problems without files and lines; `located` and `placing` add these at the boundary.
    """

    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message}" + (f"; {self.hint}" if self.hint else "")


class Refused(UsageError):
    """Carries problems to `placing`, which turns them into a SpecInvalid with their lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems, "Refused without a problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[Refused], tuple[tuple[Problem, ...]]]:
        """Makes the error picklable, so that one process can send it to another."""
        return Refused, (self.problems,)


@dataclass(frozen=True)
class SpecError:
    """A fault in a spec, with its place.

    `path` is the dotted path in the spec (`student.hidden_size`); `message` says what is wrong, `hint` what to write
    instead. `line` and `column` count from 1; 0 if there is no place (a value given by `--set`). User text in path,
    message or hint cannot begin a line of its own and is cut if it is long.
    """

    file: str
    line: int
    column: int
    path: str
    message: str
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("path", "message", "hint"):
            object.__setattr__(self, name, message_text(getattr(self, name)))

    def __str__(self) -> str:
        # The file is not cut: editors and people open it.
        file = one_line(self.file)
        place = f"{file}:{self.line}:{self.column}" if self.line else file
        where = f" {self.path}:" if self.path else ""
        return f"{place}:{where} {self.message}" + (f"; {self.hint}" if self.hint else "")


class SpecInvalid(UsageError):
    """All errors of one or more specs, in the order of their places."""

    def __init__(self, errors: Sequence[SpecError]) -> None:
        assert errors, "SpecInvalid without an error"
        found = sorted(errors, key=lambda e: (e.file, e.line, e.column, e.path))
        # What one block takes from another (`inherit`) is wrong once, at the place where it is written.
        keys = [(e.file, e.line, e.column, e.message) if e.line else e for e in found]
        self.errors = [e for i, e in enumerate(found) if keys[i] not in keys[:i]]
        super().__init__("\n".join(str(e) for e in self.errors))

    def __reduce__(self) -> tuple[type[SpecInvalid], tuple[list[SpecError]]]:
        """Makes the error picklable, so that one process can send it to another."""
        return SpecInvalid, (self.errors,)


class Document(Protocol):
    """A file that was read with the places of its values: `LoadedSpec` and `LoadedPlan`."""

    def error(self, path: str, message: str, hint: str = "") -> SpecError:
        """Returns an error at the place of the dotted `path`, or of its nearest parent."""


def located(problems: Iterable[Problem], document: Document) -> list[SpecError]:
    """Returns the problems at their places in `document`."""
    return [document.error(problem.path, problem.message, problem.hint) for problem in problems]


@contextmanager
def placing(
    document: Document, at: str | None = None, kinds: tuple[type[MinitronError], ...] = (UsageError,)
) -> Iterator[None]:
    """Re-raises errors of the body as SpecInvalid: problems at their own places in `document`, any other error of
    `kinds` at the dotted path `at`, if one is given. An error that already has its place keeps it."""
    try:
        yield
    except SpecInvalid:
        raise
    except Refused as error:
        raise SpecInvalid(located(error.problems, document)) from None
    except kinds as error:
        if at is None:
            raise
        raise SpecInvalid([document.error(at, str(error))]) from None


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's error message, or the error's class if the message is empty."""
    return str(error).strip().split("\n")[0].rstrip() or type(error).__name__
