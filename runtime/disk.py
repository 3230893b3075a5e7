"""What disks do to long work: they fill up, and two processes write to the same folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from minitron.specs.errors import UsageError, WorkError


def explain(error: Exception) -> tuple[str, str]:
    """What went wrong and what to do, for an error of writing; safetensors raises its own kind with the system's
    words."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return "the disk is full", "make room"
    return str(error), "see that it can be written to"


@contextmanager
def writing(what: str) -> Iterator[None]:
    """WorkError instead of the errors that a disk raises while `what` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, remedy = explain(error)
        raise WorkError(f"{what} could not be written: {reason}; {remedy} and run the command again") from None


@contextmanager
def only_one(folder: Path, doing: str, active: bool) -> Iterator[None]:
    """Keeps a second process from the same work; the system takes the lock back however this process ends.

    UsageError where another process holds it. Ranks that do not write (`active` false) need no lock.
    """
    if not active:
        yield
        return
    with writing(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is {doing} in {folder}; wait for it or stop it first") from None
        except OSError:
            pass  # a file system without locks, as some networks have
        yield
