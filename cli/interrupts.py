"""Interrupts that libraries swallow: a KeyboardInterrupt raised inside a callback from native code may be lost there.

The signal is remembered as well, so that long work can ask between its stages whether it should go on.
"""

from __future__ import annotations

import signal
from types import FrameType

_seen: list[int] = []


def watch() -> None:
    """Remembers SIGINT from now on, besides raising KeyboardInterrupt as Python does. Where the signal is ignored, as for
    jobs in the background of a script, or somebody else's, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _seen.append(number)
    signal.default_int_handler(number, frame)


def asked_for() -> bool:
    """Whether SIGINT has come."""
    return bool(_seen)


def check() -> None:
    """KeyboardInterrupt where one was asked for and did not arrive."""
    if asked_for():
        raise KeyboardInterrupt
