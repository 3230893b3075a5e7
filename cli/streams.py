"""Streams for stdout and stderr whose reader may go away, as `| head` does: the work goes on, and further output is
discarded.
"""

from __future__ import annotations

import os
from typing import IO, Any


class Unbreakable:
    """A text stream that discards its output once nobody reads it any more."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes `text`; returns its length even where nobody reads it."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """Flushes the written text."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        """Redirects the descriptor to nowhere, so that neither Python's last flush nor a library fails on it."""
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, self._stream.fileno())
        os.close(void)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
