"""Streams for stdout and stderr that may be closed from the beginning (`>&-`), whose reader may go away, as `| head` does, or
whose disk may be full: the work goes on, and further output is discarded.
"""

from __future__ import annotations

import os
import sys
from typing import IO, Any


def open_standard_streams() -> None:
    """Opens stdin, stdout and stderr to nowhere where the process was started without them: the next file that is opened would
    take their numbers, and be written into by whoever prints."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


class Unbreakable:
    """A text stream that discards its output once nobody reads it any more, or there is no room for it; `lost` tells why."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Writes `text`; returns its length even where nobody reads it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        """Flushes the written text."""
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        """Redirects the descriptor to nowhere, so that neither Python's last flush nor a library fails on it."""
        self.lost = self.lost or error
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, self._stream.fileno())
        os.close(void)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
