"""Listeners for tests: what was said, and something that happens at a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from minitron.specs.progress import Silent, Task


class Messages(Silent):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


class AtStep(Silent):
    """Calls `act` when training reports its step number `step` (the number within this process, from 1)."""

    def __init__(self, step: int, act: Callable[[], None], task: str = "train") -> None:
        self.step, self.act, self.heard, self.seen = step, act, task, 0

    def advance(self, amount: float = 1.0, **figures: float | str | None) -> None:
        self.seen += amount > 0
        if amount and self.seen == self.step:
            self.act()

    @contextlib.contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        with super().task(name, total, unit, done) as silent:
            yield self if name == self.heard else silent


class Figures(Silent):
    """Keeps the figures of every advance of one task."""

    def __init__(self, task: str) -> None:
        self.heard = task
        self.seen: list[dict[str, float | str | None]] = []

    def advance(self, amount: float = 1.0, **figures: float | str | None) -> None:
        self.seen.append(figures)

    @contextlib.contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Task]:
        with super().task(name, total, unit, done) as silent:
            yield self if name == self.heard else silent
