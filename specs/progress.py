"""How long work tells what it is doing, without knowing whether a terminal, a pipe or nobody is listening."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work with a known amount to do."""

    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        """`amount` more units are done; `figures` (loss, lr, ...) replace those shown beside the bar."""


class Progress(Protocol):
    """A listener. The command line has one for terminals and one for pipes; tests and libraries use `Silent`."""

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> AbstractContextManager[Task]:
        """Opens a piece of work of `total` units, of which `done` were done by an earlier process."""

    def message(self, text: str) -> None:
        """One plain line for the user."""


class _SilentTask:
    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        pass


class Silent:
    """Progress to nowhere."""

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        yield _SilentTask()

    def message(self, text: str) -> None:
        pass
