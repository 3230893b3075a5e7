"""Lists the files that a spec names, from its own tree, before any of them is opened.

A tool that checks specs of strangers runs this first: every path that a spec names is then known with its place, and no
file elsewhere was read to find it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitron.specs.data import STDLIB_PREFIX
from minitron.specs.errors import SpecError, SpecInvalid
from minitron.specs.source import Mapping, Node, Place, Scalar, Sequence, read_bytes

EXTENDS = "extends"
# Keys whose values are paths relative to the file that they stand in. `model` and `dataset` may be Hub ids as well.
PATHS = {"text", "jsonl", "parquet", "data_dir", "spec"}
PATHS_OR_IDS = {"model", "dataset"}


@dataclass(frozen=True)
class Reference:
    """One path that a spec names, at its place."""

    key: str
    """Dotted, as in `teacher.spec`."""
    text: str
    """The path as written: relative to the file, or absolute; a pattern where data is named."""
    target: Path
    """The path without `..`, by its letters alone: links are not followed."""
    place: Place

    @property
    def is_spec(self) -> bool:
        """Checks whether the path names a spec."""
        return self.key in (EXTENDS, "teacher.spec")

    def error(self, message: str, hint: str = "") -> SpecError:
        """Returns an error at the place of the path."""
        return self.place.error(self.key, message, hint)


def references(content: bytes, file: str) -> list[Reference]:
    """Returns the paths that the text of one spec names, in their order; none if the text is not a spec."""
    try:
        root, _ = read_bytes(content, file)
    except SpecInvalid:
        return []
    return list(_named(root, "", Path(file).parent))


def is_path(text: str, key: str, folder: Path) -> bool:
    """Checks whether the value of a key named `key` is a path, as seen from `folder`."""
    if text.startswith(STDLIB_PREFIX):
        return False
    if key in PATHS:
        return True
    return key in PATHS_OR_IDS and (Path(text).is_absolute() or text.startswith(".") or os.path.exists(folder / text))  # noqa: PTH110  (for any text: Path.exists raises where a name is too long)


def _named(node: Node, key: str, folder: Path) -> Iterator[Reference]:
    match node:
        case Mapping():
            for name, entry in node.entries.items():
                yield from _named(entry.node, f"{key}.{name}" if key else name, folder)
        case Sequence():
            for item in node.items:
                yield from _named(item, key, folder)
        case Scalar(value=str(text)) if key == EXTENDS or is_path(text, key.rpartition(".")[2], folder):
            yield Reference(key, text, Path(os.path.normpath(folder / text)), node.place)
