"""Reads small files that people write: specs, their bases, lock files, training plans."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

LARGEST_BYTES = 16 << 20
"""More than any spec needs: training.yaml lists its data files, and has about 100 bytes for each."""


class Unfit(OSError):
    """The error for an existing file that cannot be read whole; `strerror` gives the reason."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EINVAL, why, str(path))


def read_small(path: Path) -> bytes:
    """Returns the contents of a file. Unfit, before anything is read, for a pipe, a device and a file of more than
    LARGEST_BYTES; other kinds of OSError as `Path.read_bytes` raises them."""
    try:
        found = path.stat()
    except ValueError as error:  # a NUL in its name
        raise Unfit(path, str(error)) from None
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise Unfit(path, "it is not a regular file: write its contents to one")
    if found.st_size > LARGEST_BYTES:
        raise Unfit(path, f"it has {found.st_size >> 20} MiB: name the right file")
    return path.read_bytes()
