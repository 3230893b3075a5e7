"""The handling of full disks in long work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from minitron.specs.atomic import explain
from minitron.specs.errors import WorkError


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises WorkError in place of the errors that a disk raises while `what` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, remedy = explain(error)
        raise WorkError(f"{what} could not be written: {reason}; {remedy} and run the command again") from None
