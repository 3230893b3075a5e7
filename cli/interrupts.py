"""Interrupts: SIGTERM is one too, as schedulers send it. Libraries may swallow them: a KeyboardInterrupt raised inside a
callback from native code may be lost there.

The signal is remembered as well, so that long work can ask between its stages whether it should go on.
"""

from __future__ import annotations

import signal
from types import FrameType

from minitron.specs.signals import ENDING

_seen: list[int] = []


def watch() -> None:
    """Remembers the signals of `ENDING` from now on, and raises KeyboardInterrupt as Python does for SIGINT. Where a signal
    is ignored, as SIGINT for jobs in the background of a script and SIGHUP under nohup, or somebody else's, it stays so."""
    for number in ENDING:
        if signal.getsignal(number) is (signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL):
            signal.signal(number, _interrupt)


def no_more() -> None:
    """From here on nothing is left to interrupt: a signal that arrives twice must not disturb what is said at the end."""
    for number in ENDING:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _seen.append(number)
    signal.default_int_handler(number, frame)


def asked_for() -> bool:
    """Whether one of the signals has come."""
    return bool(_seen)


def check() -> None:
    """KeyboardInterrupt where one was asked for and did not arrive."""
    if asked_for():
        raise KeyboardInterrupt
