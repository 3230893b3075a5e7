"""Counts what training sees of a source: documents, tokens, and what is left out. Only the first part of a large source
is read, and the total is estimated from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from minitron.specs.data import Source
from minitron.specs.data_files import data_files
from minitron.specs.documents import Piece, Tally, iter_pieces
from minitron.specs.documents.opening import COMPRESSED
from minitron.specs.encoding.encoder import Array, Encoded, Encoder
from minitron.specs.encoding.pool import encode_all

SURVEYED = 4 << 20
"""Characters that are read of a source unless all of it is asked for: a few seconds."""

SHOWN_TOKENS = 64
"""The tokens that are shown of a document."""


@dataclass
class Survey:
    """The figures of one source. `tokens` and `documents` count those that were read."""

    tally: Tally = field(default_factory=Tally)
    tokens: int = 0
    learnt: int = 0
    """Tokens whose prediction is trained."""

    split: int = 0
    """Documents longer than a sequence: they go on in the next one, nothing of them is cut off."""

    longest: int = 0
    complete: bool = True
    """True where all of the source was read."""

    estimated_tokens: int | None = None
    """Tokens of the whole source; None where its size does not tell."""

    samples: list[Array] = field(default_factory=list)
    """The beginnings of the first documents."""


def survey(
    source: Source, encoder: Encoder, sequence_length: int, *, characters: int | None = SURVEYED, samples: int = 2
) -> Survey:
    """Reads a resolved source (no blend) up to `characters`; all of it if None. WorkError as for reading."""
    found = Survey()
    reader = _Reader(source, found.tally, characters)
    length = 0
    for batch in encode_all(encoder, reader.pieces()):
        for one in batch:
            length = _count(found, one, length, sequence_length, samples)
    found.complete = not reader.stopped
    found.estimated_tokens = found.tokens if found.complete else _estimate(source, found.tokens, found.tally.bytes)
    return found


def _count(found: Survey, one: Encoded, length: int, sequence_length: int, samples: int) -> int:
    """Adds a piece; returns the length so far of the document that continues behind it, 0 at a document's end."""
    if one.error is not None:
        found.tally.skip(one.error)
        found.tally.documents -= 1
        return 0
    if length == 0 and len(found.samples) < samples:
        found.samples.append(one.ids[:SHOWN_TOKENS])
    found.tokens += len(one.ids)
    found.learnt += len(one.ids) if one.learnt is None else int(one.learnt.sum())
    length += len(one.ids)
    found.longest = max(found.longest, length)
    if one.ends:
        found.split += length > sequence_length
        return 0
    return length


class _Reader:
    """Yields documents until there are enough."""

    def __init__(self, source: Source, tally: Tally, characters: int | None) -> None:
        self.source, self.tally, self.characters = source, tally, characters
        self.stopped = False

    def pieces(self) -> Iterator[Piece]:
        for piece in iter_pieces(self.source, self.tally):
            yield piece
            if self.characters is not None and self.tally.bytes >= self.characters:
                self.stopped = True
                return


def _estimate(source: Source, tokens: int, read: int) -> int | None:
    """Estimates the total in proportion to the bytes of the files; None for files whose size does not tell their
    content."""
    files = data_files(source)
    if source.kind not in ("text", "jsonl", "megatron") or any(file.suffix in COMPRESSED for file in files) or not read:
        return None
    return round(tokens * sum(file.stat().st_size for file in files if file.suffix != ".idx") / read)
