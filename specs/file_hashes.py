"""Hashes files and remembers the hashes of large ones, so that weights are not read again by every command."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from minitron.specs.atomic import write_text
from minitron.specs.errors import MinitronError, WorkError

LEAST_BYTES = 16 << 20
"""Files from this size up are remembered: smaller ones are hashed in the time that looking them up takes."""
MOST_ENTRIES = 10_000
SETTLED_NS = 2_000_000_000
"""A file changed within this time may change again under the same times: its hash is not remembered yet."""


def file_hash(path: Path) -> str:
    """Returns `sha256:...` of a file's bytes. OSError if the file cannot be read.

    A remembered hash is valid as long as the file has the same size, inode, modification time and inode change time
    (which no tool sets back).
    """
    stat = path.stat()
    if stat.st_size < LEAST_BYTES:
        return _hash(path)
    key, mark = os.path.realpath(path), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    known = _remembered()
    entry = known.get(key)
    if isinstance(entry, list) and entry[:-1] == mark and isinstance(entry[-1], str):
        return entry[-1]
    found = _hash(path)
    now = path.stat()
    settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS
    if settled and [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino] == mark:
        _remember(key, [*mark, found])
    return found


def store() -> Path:
    """Returns the path of the hash cache: `minitron/hashes.json` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "minitron" / "hashes.json"


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"


def _remembered() -> dict[str, object]:
    """Reads the hash cache; empty if the file is missing or broken, so that everything is hashed again."""
    try:
        document = json.loads(store().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _remember(key: str, entry: list[object]) -> None:
    """Adds one hash. A cache that cannot be written to only costs time."""
    known = _remembered()
    known.pop(key, None)
    kept = list(known.items())[-MOST_ENTRIES + 1 :]
    try:
        store().parent.mkdir(parents=True, exist_ok=True)
        write_text(store(), json.dumps({**dict(kept), key: entry}) + "\n")
    except (OSError, MinitronError):
        pass


def folder_hashes(folder: Path, suffixes: Iterable[str] = ("",)) -> dict[str, str]:
    """Returns name -> hash of the files in a folder whose names end in one of `suffixes`, hidden files left out.
    WorkError if a file cannot be read."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    try:
        return {name: file_hash(folder / name) for name in names if name.endswith(tuple(suffixes))}
    except OSError as error:
        raise WorkError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None


def first_difference(folder: Path, hashes: Mapping[str, str]) -> str | None:
    """Describes the first difference from `hashes`: `NAME is missing`, `NAME has changed`; None if there is none."""
    for name, expected in hashes.items():
        try:
            found = file_hash(folder / name)
        except OSError:
            return f"{name} is missing"
        if found != expected:
            return f"{name} has changed"
    return None
