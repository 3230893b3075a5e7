"""Writes files and folders atomically: under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from minitron.specs.errors import MinitronError, UsageError, WorkError

MARKER = ".minitron"
"""The file in a folder that says that minitron made it, and may replace it."""

_MARK = "Made by minitron, which replaces this folder when it makes it again. Without this file it refuses to.\n"
_PREFIX, _SUFFIX = ".minitron-", ".tmp"

# How libraries written in Rust, such as safetensors, quote an error of the operating system in one of their own.
_QUOTED = re.compile(r"\(os error (\d+)\)")


def explain(error: Exception) -> tuple[str, str]:
    """Returns (message, hint) for an error of writing; safetensors raises its own class, which quotes the system's
    error."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return "the disk is full", "make room"
    return str(error), "see that it can be written to"


def not_written(what: object, error: Exception) -> WorkError:
    """Returns the error for `what` could not be written."""
    reason, remedy = explain(error)
    return WorkError(f"{what} could not be written: {reason}; {remedy} and run the command again")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises WorkError in place of the errors that a disk raises while `what` is written."""
    try:
        yield
    except OSError as error:
        raise not_written(what, error) from None


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _usual_mode(path: Path) -> None:
    """Gives a new file or folder the permissions of the user's umask: some libraries write files that nobody else may
    read."""
    umask = os.umask(0o077)  # it can only be read by setting it; in the meantime nothing is made that is too open
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def temporary_path(target: Path, which: object = "") -> Path:
    """Returns the hidden path beside `target` under which `target` is written until it is complete.

    The name is unique to this process; `which` tells several temporary paths of one target apart. `remove_leftovers`
    removes the paths that killed processes left.
    """
    return target.with_name(".".join([f"{_PREFIX}{target.name}", *([str(which)] if which else [])]) + _SUFFIX)


def is_ours(folder: Path) -> bool:
    """Checks whether minitron made `folder`; False for an empty folder."""
    return (folder / MARKER).is_file() or not any(folder.iterdir())


def require_replaceable(folder: Path) -> None:
    """Raises UsageError if `folder` exists and minitron has not made it, because the whole folder would be replaced."""
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, and would be replaced; remove the link, or name another folder")
    if folder.exists() and not (folder.is_dir() and is_ours(folder)):
        raise UsageError(f"{folder} was not made by minitron, and would be replaced; move it away, or name another")


def claim_folder(folder: Path, names: Iterable[str], otherwise: str) -> None:
    """Marks `folder`, which is created if missing, as one that minitron writes `names` into.

    UsageError if some of these names exist and the mark does not, because the files are then somebody else's;
    `otherwise` says what to do instead.
    """
    if not (folder / MARKER).is_file():
        if there := [name for name in names if os.path.lexists(folder / name)]:
            raise UsageError(f"{folder} holds {there[0]}, which minitron did not make; move it away, or {otherwise}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(_MARK, encoding="utf-8")


@contextlib.contextmanager
def _errors_of(target: Path, temporary: Path) -> Iterator[None]:
    """Raises an OSError that names `target` in place of one that names no file or the hidden one, and of a library's error that
    only quotes one, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(target)
        elif isinstance(error.filename, str | os.PathLike):
            error.filename = os.fspath(error.filename).replace(str(temporary), str(target))
        raise
    except MinitronError:
        raise
    except Exception as error:
        quoted = _QUOTED.search(str(error))
        if quoted is None:
            raise
        number = int(quoted.group(1))
        raise OSError(number, os.strerror(number), str(target)) from error


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`; on success the file is synced and renamed to `target`, on error it is
    removed.

    The temporary name carries the process id, so that two processes never write into one file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target, os.getpid())
    try:
        with _errors_of(target, temporary):
            yield temporary
            _usual_mode(temporary)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(target)
        sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Writes `text` as UTF-8, completely or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(target: Path, size: int) -> None:
    """Writes `size` bytes beside `target` and removes them: what cannot be written is found before the work that fills
    it."""
    temporary = temporary_path(target, os.getpid())
    try:
        with _errors_of(target, temporary):
            temporary.write_bytes(bytes(size))
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path, *, resumed: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder, which on success replaces the whole folder `target`.

    The old folder is renamed before it is removed: a killed process leaves the old folder, none or the new one, never a
    part of one. UsageError if `target` is a folder that minitron has not made.

    `resumed`: the folder is that of a process that was killed or interrupted while it wrote the same, with the files that
    it completed. They must have been written by `atomic_path`, and no two processes may be at it.
    """
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target, "" if resumed else os.getpid())
    if resumed:
        remove_leftovers(temporary)
    else:
        shutil.rmtree(temporary, ignore_errors=True)
    kept = False
    try:
        with _errors_of(target, temporary):
            temporary.mkdir(exist_ok=resumed)
            yield temporary
        publish_folder(temporary, target)
    except KeyboardInterrupt:
        kept = resumed
        raise
    finally:
        if not kept:
            shutil.rmtree(temporary, ignore_errors=True)


_MADE_FOR = "made-for"


def kept_folder(target: Path, made_for: str) -> Path:
    """Returns the temporary folder of `target` with what a process that was killed completed in it; an empty one where
    that is not the same: `made_for` identifies it."""
    folder = temporary_path(target)
    try:
        same = (folder / _MADE_FOR).read_text(encoding="utf-8") == made_for
    except (OSError, ValueError):
        same = False
    if folder.is_symlink() or not folder.is_dir():
        same = False
        folder.unlink(missing_ok=True)  # whatever a link leads to is somebody else's
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(folder / _MADE_FOR, made_for)
    return folder


def publish_folder(temporary: Path, target: Path) -> None:
    """Syncs and marks a complete folder and renames it to `target`, replacing what is there. UsageError if minitron has
    not made the folder that would be replaced."""
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


def leftovers(folder: Path, name: str = "*") -> list[Path]:
    """The temporary files and folders in `folder`, of processes that were killed or are at work: those of `name`, or all."""
    return [*folder.glob(f"{_PREFIX}{name}{_SUFFIX}" if name == "*" else f"{_PREFIX}{glob.escape(name)}.*{_SUFFIX}")]


def remove_leftovers(folder: Path, name: str = "*", *, but: Collection[str] = ()) -> None:
    """Removes the temporary files and folders that killed processes left in `folder`: those of `name`, or all `but` those
    of some names, with which something can still be done."""
    kept = {temporary_path(folder / one) for one in but}
    for path in leftovers(folder, name):
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
