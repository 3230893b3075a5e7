"""Files and folders that are never half there: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from minitron.specs.errors import MinitronError

# How libraries written in Rust, such as safetensors, quote an error of the operating system in one of their own.
_QUOTED = re.compile(r"\(os error (\d+)\)")


def explain(error: Exception) -> tuple[str, str]:
    """What went wrong and what to do, for an error of writing; safetensors raises its own kind with the system's
    words."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return "the disk is full", "make room"
    return str(error), "see that it can be written to"


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _usual_mode(path: Path) -> None:
    """The permissions that a new file or folder has under the user's umask, whatever wrote it: some libraries write
    files that nobody else may read."""
    umask = os.umask(0o077)  # it can only be read by setting it; in the meantime nothing is made that is too open
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def _errors_of(target: Path) -> Iterator[None]:
    """An OSError that names `target` in place of a library's error that only quotes one: a full disk is a full disk."""
    try:
        yield
    except (OSError, MinitronError):
        raise
    except Exception as error:
        quoted = _QUOTED.search(str(error))
        if quoted is None:
            raise
        number = int(quoted.group(1))
        raise OSError(number, os.strerror(number), str(target)) from error


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`; on success it is synced and takes the name `target`, on error it goes.

    The temporary name ends in `.tmp` and carries the process id, so that two processes never write into one file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with _errors_of(target):
            yield temporary
        _usual_mode(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """The same for a folder: yields an empty temporary folder; on success it replaces `target` whole.

    The old folder is renamed before it is removed: a kill leaves the old one, none or the new one, never a part of one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _errors_of(target):
            yield temporary
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, target: Path) -> None:
    """Syncs a folder that is complete and gives it the name `target`, in the place of what had it."""
    for path in [temporary, *temporary.rglob("*")]:
        _usual_mode(path)
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            target.replace(old)
        temporary.replace(target)
        sync_folder(target.parent)
    finally:
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders that killed processes left in `folder`."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
