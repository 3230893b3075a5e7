"""The content of a command's output, independent of its rendering.

A plan or a results document is turned into sections once; the terminal, the markdown and the report page render the
same sections, so that words and order cannot differ between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# A JSON object as it stands in plan.json, results.json and their like.
Document = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of a table; figures are aligned to the right, so that digits line up."""

    name: str
    right: bool = False


@dataclass(frozen=True)
class Section:
    """A title, a table (none when `columns` is empty) and sentences that stand below it."""

    title: str
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.title}: a row does not fit the columns"


def part(document: Document, key: str) -> Document:
    """Returns the object under `key`; an empty one where there is none, for documents of an older or an interrupted
    command.
    """
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def entries(document: Document, key: str) -> list[Document]:
    """Returns the list of objects under `key`, without entries that are not objects."""
    value = document.get(key)
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
