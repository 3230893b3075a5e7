"""The measurements of a build, each stored under everything that it depends on, so that none is made twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.runtime.disk import writing
from minitron.runtime.models import weight_files
from minitron.runtime.world import World
from minitron.specs.atomic import check_writable, write_text
from minitron.specs.builds import CONFIG, MEASUREMENTS, RESULTS

_FORMAT = 1
_PROBE_BYTES = 1 << 20
"""An upper bound of the size of an evaluation's results."""

Entry = dict[str, Any]


def check_room(build: Path) -> None:
    """Checks that the results can be written into `build`. WorkError, before anything is measured, where they
    cannot.
    """
    with writing(f"{build}: results"):
        check_writable(build / RESULTS, _PROBE_BYTES)


class Measurements:
    """The stored measurements of a build. All ranks make the same calls; the leader reads and writes the file."""

    def __init__(self, build: Path, world: World) -> None:
        self._path, self._world = build / MEASUREMENTS, world
        content = world.from_leader(lambda: _read(self._path))
        self._entries: dict[str, Entry] = content["measurements"]
        self._files: dict[str, list[Any]] = content["files"]

    def find(self, key: str) -> Any:
        """Returns the measurement stored under `key`; None where there is none."""
        entry = self._entries.get(key)
        return None if entry is None else entry["value"]

    def keep(self, key: str, of: Mapping[str, Any], value: Any) -> None:
        """Stores a measurement; `of` describes in words what was measured."""
        self._entries[key] = {"of": dict(of), "value": value}
        self._write()

    def model(self, folder: Path) -> str:
        """Identifies a model by the content of its configuration and weights. A file whose size and modification time
        are unchanged since the last reading is not read again.
        """

        def identify() -> str:
            digest = hashlib.sha256()
            before = dict(self._files)
            for path in [folder / CONFIG, *weight_files(folder)]:
                digest.update(f"{path.name} {self._content(path)}\n".encode())
            if before != self._files:
                self._write()
            return digest.hexdigest()

        return self._world.from_leader(identify)

    def _content(self, path: Path) -> str:
        state = path.stat()
        seen = [state.st_size, state.st_mtime_ns]
        known = self._files.get(str(path))
        if known is None or known[:2] != seen:
            with path.open("rb") as content:
                known = [*seen, hashlib.file_digest(content, "sha256").hexdigest()]
            self._files[str(path)] = known
        return str(known[2])

    def _write(self) -> None:
        if self._world.leads:
            document = {"format": _FORMAT, "files": self._files, "measurements": self._entries}
            with writing(str(self._path)):
                write_text(self._path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """Reads the file's content; empty where the file is missing, broken or of another format: then everything is
    measured again.
    """
    nothing: dict[str, Any] = {"measurements": {}, "files": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return nothing
    whole = (
        isinstance(content, dict)
        and content.get("format") == _FORMAT
        and all(isinstance(content.get(key), dict) for key in nothing)
        and all(isinstance(entry, dict) and "value" in entry for entry in content["measurements"].values())
        and all(isinstance(known, list) and len(known) == 3 for known in content["files"].values())
    )
    return content if whole else nothing


def key_of(**depends: Any) -> str:
    """Returns the key of a measurement that depends on these values."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
