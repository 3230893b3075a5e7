"""The handling of full disks in long work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from minitron.specs.atomic import not_written


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises WorkError in place of the errors that a disk raises while `what` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise not_written(what, error) from None
