"""The interface through which long work reports progress, independent of a terminal, a pipe or no listener."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """A running piece of work with a known total."""

    def advance(self, amount: float = 1.0, **figures: float | str | None) -> None:
        """Adds `amount` finished units; `figures` (loss, lr, ...) replace those shown beside the bar, and None removes one."""


class Progress(Protocol):
    """A listener. The command line has one for terminals and one for pipes; tests and libraries use `Silent`."""

    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> AbstractContextManager[Task]:
        """Opens a piece of work of `total` units, of which `done` were done by an earlier process."""

    def message(self, text: str) -> None:
        """Shows one plain line to the user."""


class _SilentTask:
    def advance(self, amount: float = 1.0, **figures: float | str | None) -> None:
        pass


class Silent:
    """A progress listener that shows nothing."""

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        yield _SilentTask()

    def message(self, text: str) -> None:
        pass
