"""Allows one process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.specs.atomic import not_written
from minitron.specs.errors import UsageError

LOCK = ".minitron.lock"
"""The file that a process holds locked while it writes into a folder. It stays there; the lock ends with the process."""


@contextmanager
def only_one(folder: Path, doing: str, *, active: bool = True) -> Iterator[None]:
    """Keeps a second process from writing into `folder`, which is created if missing. The system releases the lock
    however this process ends.

    UsageError, with what the other process is `doing`, if another process holds the lock; WorkError if the folder
    cannot be written to. Ranks that do not write (`active` false) need no lock.
    """
    if not active:
        yield
        return
    with _held(folder, doing, None):
        yield


@contextmanager
def in_turn(folder: Path, doing: str, waiting: Callable[[str], None]) -> Iterator[None]:
    """Keeps a second process from writing into `folder` as `only_one` does, but waits for the first, after `waiting` was
    told for whom."""
    with _held(folder, doing, waiting):
        yield


@contextmanager
def _held(folder: Path, doing: str, waiting: Callable[[str], None] | None) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise not_written(folder, error) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 200, 0).decode("utf-8", errors="replace").strip() or "at work"
            if waiting is None:
                raise UsageError(f"another process is {holder} in {folder}; wait for it or stop it first") from None
            waiting(f"waiting for another process, which is {holder} in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks, as some networks have
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{doing} (process {os.getpid()} on {socket.gethostname()})\n".encode(), 0)
        except OSError as error:
            raise not_written(folder, error) from None
        yield
    finally:
        os.close(lock)
