"""Interrupts of a command, SIGTERM included, as schedulers send it. A KeyboardInterrupt may be lost where it is raised
inside a callback from native code.

The signal is therefore remembered as well, so that long work can ask between its stages whether it should go on.
"""

from __future__ import annotations

import signal
from types import FrameType

from minitron.specs.signals import ENDING

_seen: list[int] = []


def watch() -> None:
    """Remembers the signals of `ENDING` from now on, and raises KeyboardInterrupt as Python does for SIGINT. A signal
    that is ignored, as SIGINT for jobs in the background of a script and SIGHUP under nohup, or that has another
    handler is left alone.
    """
    for number in ENDING:
        if signal.getsignal(number) is (signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL):
            signal.signal(number, _interrupt)


def no_more() -> None:
    """Ignores the signals from here on: nothing is left to interrupt, and a signal that arrives twice must not disturb
    the last messages.
    """
    for number in ENDING:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _seen.append(number)
    signal.default_int_handler(number, frame)


def asked_for() -> bool:
    """Tells whether one of the signals has come."""
    return bool(_seen)


def check() -> None:
    """Raises KeyboardInterrupt where a signal has come but its exception was lost."""
    if asked_for():
        raise KeyboardInterrupt
