"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.specs.atomic import explain
from minitron.specs.errors import UsageError, WorkError


@contextmanager
def only_one(folder: Path, doing: str, *, active: bool = True, file: str | None = None) -> Iterator[None]:
    """Keeps a second process from the same work in `folder`, which is made where it is not there. The folder itself is
    locked, or a `file` in it; the system takes the lock back however this process ends.

    UsageError where another process holds it, WorkError where the folder cannot be written to. Ranks that do not write
    (`active` false) need no lock.
    """
    if not active:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / file, os.O_WRONLY | os.O_CREAT, 0o666) if file else os.open(folder, os.O_RDONLY)
    except OSError as error:
        reason, remedy = explain(error)
        raise WorkError(f"{folder} could not be written: {reason}; {remedy} and run the command again") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is {doing} in {folder}; wait for it or stop it first") from None
        except OSError:
            pass  # a file system without locks, as some networks have
        yield
    finally:
        os.close(lock)
