"""Chooses a share of the documents by a hash of what they say: the same documents in every order and beside any others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from minitron.specs.data import Source
from minitron.specs.documents.kinds import Conversation, Document, Piece, TokenIds


def chosen(pieces: Iterator[Piece], source: Source) -> Iterator[Piece]:
    """The pieces of the documents that `only` and `leave_out` let through. A long document is chosen by its first piece, and
    documents that begin alike go the same way, copies of one another among them."""
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
    """Where a document stands between 0 and 1."""
    if isinstance(document, str):
        content = document
    elif isinstance(document, TokenIds):
        content = json.dumps([int(one) for one in document.ids])
    else:
        assert isinstance(document, Conversation)
        content = json.dumps([document.messages, document.tools], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") / 2**64
