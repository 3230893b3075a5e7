"""Ctrl-C and SIGTERM: first ask, then obey."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Set while a checkpoint can be written first (`deferred`); otherwise the signal raises KeyboardInterrupt at
    once."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self.deferred or self.requested:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """The first signal in here is only noted, for the loop to act on between two steps; the second one raises."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Takes SIGINT and SIGTERM over until it ends. Outside the main thread, where Python allows no handlers, it
    does nothing."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
