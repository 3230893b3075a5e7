"""Reads the documents of a data source one after the other, in an order that depends on nothing but the files.

A document is a text, a conversation (rendered later with the tokenizer's chat template), or token ids. Long texts come
in pieces, so that memory does not grow with a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from minitron.specs.data import BlendPart, DataSource, Source
from minitron.specs.data_files import check_data, content_hash, data_files, resolve
from minitron.specs.documents.check import check_readable, check_share
from minitron.specs.documents.kinds import Conversation, Document, Piece, Tally, TokenIds, size_of
from minitron.specs.documents.readers import describe, documents_of, read_source
from minitron.specs.errors import WorkError

__all__ = [
    "Conversation",
    "DataSource",
    "Document",
    "Piece",
    "Tally",
    "TokenIds",
    "check_data",
    "check_readable",
    "check_share",
    "content_hash",
    "data_files",
    "iter_documents",
    "iter_pieces",
    "resolve",
    "size_of",
]


def iter_documents(source: Source, *, limit: int | None = None, tally: Tally | None = None) -> Iterator[Document]:
    """Yields the documents of a resolved source that are not blank, at most `limit`; each complete, however long.

    WorkError for a file that cannot be read in the form that the source states, and if there is no document at all.
    """
    return itertools.islice(documents_of(iter_pieces(source, tally)), limit)


def iter_pieces(source: Source, tally: Tally | None = None) -> Iterator[Piece]:
    """Yields the documents of a resolved source in pieces; `tally` counts the documents read and left out."""
    tally = Tally() if tally is None else tally
    if isinstance(source, DataSource) and source.blend is not None:
        return _blended(source.blend, tally)
    pieces = read_source(source, tally)
    first = next(pieces, None)
    if first is None:
        share = f", of which only {source.only:.3g} is read" if source.only is not None else ""
        left_out = f" ({tally.skipped} could not be read, such as {tally.reasons[0]})" if tally.skipped else ""
        raise WorkError(f"there is no document in {describe(source)}{share}{left_out}; name other data in the spec")
    return itertools.chain([first], pieces)


def _blended(parts: tuple[BlendPart, ...], tally: Tally) -> Iterator[Piece]:
    """Yields documents of several sources so that the characters read from each stay in proportion to its share.

    The blend ends when every source was read once; a source that ends earlier starts again, so that the proportions
    hold to the end.
    """
    streams = [iter_pieces(part, tally) for part in parts]
    read = [0.0] * len(parts)
    unfinished = set(range(len(parts)))
    while unfinished:
        index = min(range(len(parts)), key=lambda one: (read[one] / parts[one].share, one))
        while True:
            piece = next(streams[index], None)
            if piece is None:
                unfinished.discard(index)
                streams[index] = iter_pieces(parts[index], tally)
                break
            read[index] += size_of(piece.content)
            yield piece
            if piece.ends:
                break
