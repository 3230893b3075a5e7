"""Silences what libraries log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_logs(level: int) -> Iterator[None]:
    """Silences log messages of `level` and below inside the context, whichever library writes them."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)
