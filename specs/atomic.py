"""Files and folders that are never half there: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from minitron.specs.errors import MinitronError, UsageError

MARKER = ".minitron"
"""The file in a folder that says that minitron made it, and may replace it."""

_MARK = "Made by minitron, which replaces this folder when it makes it again. Without this file it refuses to.\n"
_PREFIX, _SUFFIX = ".minitron-", ".tmp"

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


def temporary_path(target: Path, which: object = "") -> Path:
    """Where `target` is written until it is whole: a hidden name beside it that nobody else uses, `which` tells several
    apart. What a killed process left there, `remove_leftovers` finds."""
    return target.with_name(".".join([f"{_PREFIX}{target.name}", *([str(which)] if which else [])]) + _SUFFIX)


def is_ours(folder: Path) -> bool:
    """Whether minitron made `folder`; an empty one is nobody's."""
    return (folder / MARKER).is_file() or not any(folder.iterdir())


def require_replaceable(folder: Path) -> None:
    """UsageError where `folder` is there and minitron has not made it: it would be replaced whole."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, and would be replaced; remove the link, or name another folder")
    if folder.exists() and not (folder.is_dir() and is_ours(folder)):
        raise UsageError(f"{folder} was not made by minitron, and would be replaced; move it away, or name another")


def claim_folder(folder: Path, names: Iterable[str], otherwise: str) -> None:
    """Marks `folder`, which is made where it is not there, as one that minitron writes `names` into. UsageError where some
    of these are there already and the mark is not: somebody else's; `otherwise` says what to do then."""
    if not (folder / MARKER).is_file():
        if there := [name for name in names if os.path.lexists(folder / name)]:
            raise UsageError(f"{folder} holds {there[0]}, which minitron did not make; move it away, or {otherwise}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(_MARK, encoding="utf-8")


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

    The temporary name carries the process id, so that two processes never write into one file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target, os.getpid())
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
    UsageError where `target` is a folder that minitron has not made.
    """
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target, os.getpid())
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _errors_of(target):
            yield temporary
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, target: Path) -> None:
    """Syncs a folder that is complete, marks it and gives it the name `target`, in the place of what had it. UsageError
    where that was not made by minitron."""
    (temporary / MARKER).write_text(_MARK, encoding="utf-8")
    for path in [temporary, *temporary.rglob("*")]:
        _usual_mode(path)
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    require_replaceable(target)
    old = temporary_path(target, f"{os.getpid()}.old")
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


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes temporary files and folders that killed processes left in `folder`, of `name` or of all that they wrote."""
    for path in folder.glob(f"{_PREFIX}{name}{_SUFFIX}" if name == "*" else f"{_PREFIX}{glob.escape(name)}.*{_SUFFIX}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
