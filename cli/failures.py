"""The conversion of an exception to the user's output: a sentence on stderr or an `errors` document, and an exit
code.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from minitron.specs.errors import MinitronError, Refused, SpecError, SpecInvalid

DONE = 0
FAILED = 1
WRONG = 2
INTERRUPTED = 130

_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the disk quota is used up"}


@dataclass(frozen=True)
class Failure:
    """The outcome of a command that failed."""

    exit_code: int
    errors: tuple[SpecError, ...]
    follows: bool = False
    """Tells whether the failure may be a mere consequence of another process's failure."""

    def lines(self) -> list[str]:
        """Returns the lines for stderr: one line an error, those of a spec in the form that editors and CI can jump
        to.
        """
        kind = "" if self.exit_code == INTERRUPTED else "error: "
        return [
            str(error) if error.file else f"{kind}{error.message}" + (f"; {error.hint}" if error.hint else "")
            for error in self.errors
        ]

    def document(self) -> dict[str, object]:
        """Returns the same errors as the document of `--json`."""
        return {"errors": errors_document(self.errors)}


def errors_document(errors: Sequence[SpecError]) -> list[dict[str, object]]:
    """Returns the errors as `[{file, line, column, path, message, hint}]`."""
    return [asdict(error) for error in errors]


def failure_of(error: BaseException) -> Failure:
    """Returns the messages and the exit code for `error`. Never raises: every error ends here."""
    if isinstance(error, SpecInvalid):
        return Failure(error.exit_code, tuple(error.errors))
    if isinstance(error, Refused):
        return Failure(error.exit_code, tuple(SpecError("", 0, 0, "", str(problem)) for problem in error.problems))
    if isinstance(error, MinitronError):
        return replace(_failure(error.exit_code, str(error)), follows=error.follows)
    if isinstance(error, KeyboardInterrupt):
        hint = "the same command, started again, goes on where it was"
        return replace(_failure(INTERRUPTED, "interrupted", hint), follows=True)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return _failure(WRONG, f"{error.filename}: a path that is too long", "write a shorter one")
    if isinstance(error, OSError):
        return _failure(FAILED, *_os_words(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        # The name and not the class: torch's own OutOfMemoryError would need an import of torch to be compared with.
        return _failure(
            FAILED,
            "out of memory",
            "make memory free; a smaller micro_batch_size or sequence_length trains in less",
        )
    if is_call_error(error):
        refusal = _call_words(error)
        return _failure(WRONG, refusal) if refusal else Failure(WRONG, ())
    words = str(error).strip().splitlines()
    unexpected = _failure(
        FAILED,
        f"unexpected {type(error).__name__}" + (f": {words[0]}" if words else ""),
        "run again with --debug to see where it comes from",
    )
    return replace(unexpected, follows=True)


def is_call_error(error: BaseException) -> bool:
    """Checks whether typer refused the arguments, by attributes of the error: its class has moved between typer's
    releases.
    """
    return hasattr(error, "format_message") and getattr(error, "exit_code", None) == WRONG


def _failure(exit_code: int, message: str, hint: str = "") -> Failure:
    return Failure(exit_code, (SpecError("", 0, 0, "", message, hint),))


def _os_words(error: OSError) -> tuple[str, str]:
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    if error.errno in _FULL:
        return f"{where}{_FULL[error.errno]}", "make room and start the same command again: it goes on where it was"
    if error.errno == errno.EROFS:
        return f"{where}the file system is read-only", "choose another folder with -o"
    if isinstance(error, PermissionError):
        return f"{where}no permission", "change its owner or mode, or choose another folder with -o"
    if isinstance(error, ConnectionError | TimeoutError):
        return f"the network failed: {what}", "check the connection and start the same command again"
    if isinstance(error, FileNotFoundError):
        return f"{where}no such file or folder", "check the path"
    return f"{where}{what[:1].lower()}{what[1:]}", ""


def _call_words(error: BaseException) -> str:
    """Returns typer's message; empty where typer has printed the help instead."""
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    if not message:
        return ""
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "minitron")
    message = f"{message[:1].lower()}{message[1:]}".rstrip(".")
    return f"{message}; `{path} --help` shows how it is called"
