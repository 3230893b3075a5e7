"""The options for the amount and the place of a command's output: `--quiet`, `--verbose` and `--log-file`, which may
stand anywhere on the line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from minitron.specs.errors import UsageError
from minitron.specs.progress import Progress, Silent, Task


@dataclass
class Output:
    """The output options of the command. A log gets progress and messages with the time, whatever the terminal
    shows.
    """

    quiet: bool = False
    verbose: bool = False
    log: IO[str] | None = None
    given: tuple[str, ...] = ()
    """The options as they were given, `--debug` among them, for processes that this one starts."""


_now = Output()


def configure(arguments: Sequence[str]) -> list[str]:
    """Removes the output options from the arguments and applies them. UsageError where a log cannot be written."""
    rest: list[str] = []
    name: str | None = None
    waiting = iter(arguments)
    _now.quiet, _now.verbose, _now.log = False, False, None
    _now.given = tuple(one for one in ("--quiet", "--verbose", "--debug") if one in arguments)
    for one in waiting:
        if one == "--quiet":
            _now.quiet = True
        elif one == "--verbose":
            _now.verbose = True
        elif one == "--log-file":
            name = next(waiting, "")
        elif one.startswith("--log-file="):
            name = one.partition("=")[2]
        else:
            rest.append(one)
    if _now.quiet and _now.verbose:
        raise UsageError("--quiet and --verbose ask for opposites; choose one")
    if name is not None:
        _now.log = _open(name)
        _now.given += ("--log-file", str(Path(name).absolute()))
    return rest


def _open(name: str) -> IO[str]:
    if not name or name.startswith("-"):
        raise UsageError("--log-file: names no file; write --log-file FILE")
    try:
        return Path(name).open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError as error:
        raise UsageError(f"--log-file {name}: cannot be written ({error.strerror}); name another file") from None


def quiet() -> bool:
    """Tells whether only results and errors are wanted."""
    return _now.quiet


def verbose() -> bool:
    """Tells whether libraries may print messages as well."""
    return _now.verbose


def given() -> tuple[str, ...]:
    """Returns the output options of this command, for processes that it starts."""
    return _now.given


def log(line: str) -> None:
    """Writes one line with the time to the log, where there is one."""
    if _now.log is not None:
        _now.log.write(f"{stamp()}{line}\n")


def stamp() -> str:
    """Returns the local time, for the beginning of a log line."""
    return time.strftime("%Y-%m-%d %H:%M:%S ")


def progress() -> Progress:
    """Returns the progress display of long work: on stderr, in the log, in both, or nowhere."""
    from minitron.cli.consoles import stderr_console
    from minitron.cli.progress import LineProgress, progress_for

    shown: Progress = Silent() if _now.quiet else progress_for(stderr_console(), stamp)
    return shown if _now.log is None else _Both(shown, LineProgress(_now.log, stamp=stamp))


class _Both:
    """A progress display that forwards to two others."""

    def __init__(self, *shown: Progress) -> None:
        self._shown = shown

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        """Opens a task in both."""
        with ExitStack() as stack:
            yield _Tasks([stack.enter_context(one.task(name, total, unit, done)) for one in self._shown])

    def message(self, text: str) -> None:
        """Writes one line to both."""
        for one in self._shown:
            one.message(text)


class _Tasks:
    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks

    def advance(self, amount: float = 1.0, **shown: float | str | None) -> None:
        """Advances both."""
        for one in self._tasks:
            one.advance(amount, **shown)
