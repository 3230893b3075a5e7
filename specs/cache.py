"""The cache beside the builds: what is costly to make and follows from its inputs alone, each entry under their hash.

CACHE/
    scores/KEY.safetensors      importance scores and Gram matrices of a teacher on its calibration samples
    tokens/KEY/                 the tokens of a data source
    teacher_logits/KEY/         samples of a teacher's distribution over the training data
    checks/KEY.json             the checks that a teacher passed

Builds do not need the cache: what they keep lies in them, as a second link to the same bytes where the file system has
links. Tokens are only in the cache. An entry may be removed at any time; it is then made again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minitron.specs.atomic import MARKER, atomic_path, claim_folder, leftovers, temporary_path
from minitron.specs.builds import DATA_CACHE
from minitron.specs.errors import UsageError
from minitron.specs.locks import LOCK

VARIABLE = "MINITRON_CACHE"
NO_CACHE = "none"
SCORES, TOKENS, TEACHER_LOGITS, CHECKS = "scores", "tokens", "teacher_logits", "checks"
KINDS = (SCORES, TOKENS, TEACHER_LOGITS, CHECKS)
ABANDONED_SECONDS = 86_400.0
"""A temporary file or folder that nothing was written into for this long was left by a process that is gone."""

_BUILDS = "builds"
"""The name of the folder for builds, in which the cache is plainly `.cache`."""


@dataclass(frozen=True)
class Entry:
    """One entry of a cache: a file or a folder, its bytes, and when it was last used (seconds since 1970)."""

    kind: str
    path: Path
    bytes: int
    used: float


def cache_folder(build: Path) -> Path | None:
    """Returns the cache that a build shares with the builds beside it: the folder that MINITRON_CACHE names, else
    `builds/.cache`; None where MINITRON_CACHE is `none`."""
    named = os.environ.get(VARIABLE)
    if named:
        return None if named == NO_CACHE else Path(named).expanduser().absolute()
    beside = build.absolute().parent
    # Elsewhere `.cache` may be what the user's other programs call theirs.
    return beside / (".cache" if beside.name == _BUILDS else ".minitron-cache")


def entry_path(build: Path, kind: str, name: str) -> Path | None:
    """Returns the place of an entry in the cache of a build, None where there is no cache. The cache is made and marked
    first; UsageError where the folder is somebody else's."""
    assert kind in KINDS
    cache = cache_folder(build)
    if cache is None:
        return None
    if cache.exists() and not cache.is_dir():
        raise UsageError(f"{cache}: a file, and the cache needs a folder; set {VARIABLE} to a folder, or to {NO_CACHE}")
    claim_folder(cache, KINDS, f"set {VARIABLE}")
    (cache / kind).mkdir(exist_ok=True)
    for path in abandoned(cache, [kind]):
        discard(path)
    return cache / kind / name


def tokens_folder(build: Path, work: Path) -> Path:
    """Returns the folder in which the tokens of data sources lie: in the cache, or in the training's `work` folder."""
    entry = entry_path(build, TOKENS, "any")
    return work / DATA_CACHE if entry is None else entry.parent


def mark_used(entry: Path) -> None:
    """Notes that an entry was used now, for `minitron cache --unused`. A cache that cannot be written to only forgets
    it."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def link_file(source: Path, target: Path) -> None:
    """Makes `target` a second link to the file `source`, or a copy where the file system has no links; replaces what
    is there. Only for files that are never changed in place."""
    with atomic_path(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def share_file(source: Path, target: Path | None) -> None:
    """Links a file from a build into the cache or from the cache into a build, and marks it used. A cache that cannot
    be written to only costs the next build its time."""
    if target is None:
        return
    with contextlib.suppress(OSError):
        if not (target.is_file() and target.samefile(source)):
            link_file(source, target)
        mark_used(source)


def entries(cache: Path) -> list[Entry]:
    """Returns all entries, the one that was used longest ago first. UsageError where the folder is not a cache."""
    if not cache.exists():
        return []
    if not (cache / MARKER).is_file():
        raise UsageError(f"{cache} is not a cache of minitron; name the folder of the builds, or set {VARIABLE}")
    found = [_entry(kind, path) for kind in KINDS for path in _paths(cache / kind)]
    return sorted(found, key=lambda one: (one.used, str(one.path)))


def remove(entry: Entry) -> None:
    """Removes an entry. It is renamed first: what is half removed must not look like one."""
    aside = temporary_path(entry.path, "removed")
    entry.path.replace(aside)
    discard(aside)


def abandoned(cache: Path, kinds: Sequence[str] = KINDS) -> list[Path]:
    """The temporary files and folders that killed processes left. By age, for the process may have run on another machine:
    the last time that anything in them was written."""
    before = time.time() - ABANDONED_SECONDS
    return [path for kind in kinds for path in leftovers(cache / kind) if _last_written(path) < before]


def discard(path: Path) -> None:
    """Removes a temporary file or folder; another process may be doing the same."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _last_written(path: Path) -> float:
    times = [0.0]
    for one in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            times.append(one.lstat().st_mtime)
    return max(times)


def _paths(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_symlink())


def _entry(kind: str, path: Path) -> Entry:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file() and one.name != LOCK]
    return Entry(kind, path, sum(one.stat().st_size for one in files), path.stat().st_mtime)
