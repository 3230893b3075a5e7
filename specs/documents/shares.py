"""Chooses a share of the documents by a hash of their content: the same documents in every order and in any mixture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minitron.specs.data import Source
from minitron.specs.documents.kinds import Conversation, Document, Piece, TokenIds, size_of

SOUGHT = 64 << 20
"""Characters that are read at most to find documents on both sides of a share: a second."""


@dataclass(frozen=True)
class Sides:
    """The number of documents below and above a share, and whether all documents were counted."""

    below: int
    above: int
    all: bool


def places(pieces: Iterable[Piece]) -> Iterator[float | None]:
    """Yields the place of every document between 0 and 1, which shares divide; None once for all that lie behind `SOUGHT`
    characters.
    """
    characters = 0
    for piece in pieces:
        if characters > SOUGHT:
            yield None
            return
        characters += size_of(piece.content)
        if piece.begins:
            yield _place(piece.content)


def count_sides(found: Iterable[float | None], share: float, enough: int = 1) -> Sides:
    """Counts the documents that `only: share` and `leave_out: share` let through, by their places, until both
    have `enough`.
    """
    below = above = 0
    for place in found:
        if place is None or min(below, above) >= enough:
            return Sides(below, above, all=False)
        below, above = below + (place < share), above + (place >= share)
    return Sides(below, above, all=True)


def chosen(pieces: Iterator[Piece], source: Source) -> Iterator[Piece]:
    """Yields the pieces of the documents that `only` and `leave_out` let through.

    The first piece decides for a long document, so documents with the same beginning, copies included, go the same way.
    """
    kept = True
    for piece in pieces:
        if piece.begins:
            place = _place(piece.content)
            kept = (source.only is None or place < source.only) and (
                source.leave_out is None or place >= source.leave_out
            )
        if kept:
            yield piece


def _place(document: Document) -> float:
    """Maps a document to a number between 0 and 1 by a hash of its content."""
    if isinstance(document, str):
        content = document
    elif isinstance(document, TokenIds):
        content = json.dumps([int(one) for one in document.ids])
    else:
        assert isinstance(document, Conversation)
        content = json.dumps([document.messages, document.tools], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") / 2**64
