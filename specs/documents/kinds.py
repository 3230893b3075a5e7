"""The types of documents that sources yield, and the count of documents read and left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from minitron.specs.one_line import plural

Message: TypeAlias = dict[str, Any]

SHOWN = 3
"""Reasons that a tally keeps: enough to see of which kind they are."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages, which the encoder renders with the tokenizer's chat template."""

    messages: list[Message]
    tools: list[Any] | None = None
    train_on: Literal["assistant", "all"] = "all"
    pair: bool = False
    """A prompt and its completion: without a chat template they are plain text, one after the other."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The token ids of a document that was tokenized before."""

    ids: Sequence[int]


Document: TypeAlias = str | Conversation | TokenIds


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a text too long to be held in memory; `where` names the piece in messages."""

    content: Document
    where: str
    begins: bool = True
    """True where a document begins here; otherwise the piece goes on where the one before ended."""

    ends: bool = True
    lenient: bool = False
    """True where the document is left out and counted if it cannot be rendered (`on_error: skip`)."""


@dataclass(slots=True)
class Tally:
    """The number of documents that were read and of those that were left out."""

    documents: int = 0
    bytes: int = 0
    """Bytes of the files' contents that were read, roughly: of their lines, or of the documents in them."""

    empty: int = 0
    """Documents without anything but white space, and those that are null."""

    skipped: int = 0
    """Documents that could not be read, under `on_error: skip`."""

    repaired: int = 0
    """Documents in which halves of surrogate pairs were replaced by U+FFFD."""

    reasons: list[str] = field(default_factory=list)
    """The reasons why the first few were skipped."""

    open: list[Path] = field(default_factory=list)
    """Files that are being read."""

    closed: list[Path] = field(default_factory=list)
    """Files that were read, to their end or as far as was wanted."""

    @contextmanager
    def reading(self, file: Path) -> Iterator[None]:
        """Notes that a file is being read."""
        self.open.append(file)
        try:
            yield
        finally:
            self.open.remove(file)
            self.closed.append(file)

    def skip(self, reason: str) -> None:
        self.skipped += 1
        if len(self.reasons) < SHOWN:
            self.reasons.append(reason)

    def notes(self) -> list[str]:
        """Returns remarks for the user, one sentence each."""
        notes = []
        if self.skipped:
            were = "was" if self.skipped == 1 else "were"
            unread = f"{plural(self.skipped, 'document')} could not be read and {were} left out"
            notes.append(f"{unread}, such as {self.reasons[0]}")
        if self.repaired:
            notes.append(f"in {plural(self.repaired, 'document')} halves of surrogate pairs were replaced by U+FFFD")
        return notes


def size_of(document: Document) -> int:
    """Returns roughly the number of characters, for proportions and for dividing work into batches."""
    if isinstance(document, str):
        return len(document)
    if isinstance(document, TokenIds):
        return 4 * len(document.ids)
    return sum(len(str(message)) for message in document.messages)
