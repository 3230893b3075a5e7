"""The signals that ask a training to end: the first is noted until a checkpoint is written, a later one is obeyed at
once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from minitron.specs.signals import ECHO_SECONDS, ENDING

Handler = Callable[[int, FrameType | None], None]


class Interrupt:
    """The state of the interrupt: set while a checkpoint can be written first (`deferred`); otherwise the signal raises
    KeyboardInterrupt at once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested = False
        self.deferred = False
        self._clock = clock
        self._first: float | None = None

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        now = self._clock()
        self._first = now if self._first is None else self._first
        if not self.deferred or now - self._first >= ECHO_SECONDS:
            raise KeyboardInterrupt
        self.requested = True

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Defers the first signal inside the context, for the loop to act on between two steps; another signal, seconds
        later, raises.
        """
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Notes the signals of `ENDING` inside the context, as `handling` does."""
    interrupt = Interrupt()
    with handling(interrupt.on_signal):
        yield interrupt


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Hands the signals of `ENDING` to `handler` inside the context, except ignored ones, such as Ctrl-C in the background
    of a script and SIGHUP under nohup. Outside the main thread, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler) for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
