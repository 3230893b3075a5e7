"""Writes the tokens of a data source in shards, after those that an earlier process has written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from minitron.specs.atomic import remove_leftovers, write_text, writing
from minitron.specs.data import Source
from minitron.specs.documents import Piece, Tally, data_files, iter_pieces, size_of
from minitron.specs.documents.changes import Marks, marks_of, require_unchanged
from minitron.specs.documents.opening import COMPRESSED
from minitron.specs.encoding import Encoded, Encoder
from minitron.specs.encoding.pool import Pool, encode_all
from minitron.specs.errors import WorkError
from minitron.specs.one_line import plural
from minitron.specs.progress import Progress
from minitron.specs.shards.stream import (
    FORMAT_VERSION,
    INDEX,
    Array,
    Largest,
    ShardIndex,
    is_whole,
    read_shard_index,
    shard_file,
    write_shard,
)

SHARD_TOKENS = 1 << 24
"""The tokens of a shard: a few seconds of work, which is the loss when a process is killed, and at most 200 MB while it
is written.
"""

TOKENIZING = "tokenizing"
"""The work that a process that writes a stream names in the folder's lock."""


@dataclass(frozen=True)
class Part:
    """A resolved source (no blend) and the folder that its stream is written to."""

    source: Source
    folder: Path
    limit: int | None = None
    """The stream ends after this many tokens; None: with the source."""

    until: int | None = None
    """Nothing is written behind the shard with which the stream has this many tokens; None: all of it is."""

    share: float = 1.0
    """The part's share in a blend: its shards are written in proportion to it."""

    marks: Marks | None = None
    """The marks of its files from when their hash was taken; None: as they look when the first document is read."""


@dataclass(frozen=True)
class Tokenizing:
    """The encoder of all parts, the size of its vocabulary, and the tokens of a shard."""

    encoder: Encoder
    vocabulary: int
    shard_tokens: int = field(default_factory=lambda: SHARD_TOKENS)


def write_stream(part: Part, how: Tokenizing, progress: Progress, pool: Pool | None = None) -> Iterator[int]:
    """Writes the stream of a source a shard at each turn, after what an earlier process has written of it, and yields
    the number of tokens that are written; `stream.json` says at last that all are. Whoever calls holds the folder's lock.

    WorkError as for reading and encoding, and for a disk that cannot be written to.
    """
    with writing(str(part.folder)):
        remove_leftovers(part.folder)
        tally = Tally()
        marks = marks_of(part.source) if part.marks is None else part.marks
        writer = _Writer(part.folder, how, lambda: require_unchanged(marks, tally))
        if writer.number:
            progress.message(f"going on with the tokenized data after {writer.tokens} tokens")
            yield writer.tokens
        yield from _shards(part, how.encoder, writer, _heard(part.source, tally, progress), pool)
        require_unchanged(marks, tally)
        for reason in writer.refused:
            tally.skip(reason)
        about = {
            "format_version": FORMAT_VERSION, "shards": writer.number, "tokens": writer.tokens,
            "documents": writer.documents, "empty": tally.empty, "skipped": tally.skipped, "repaired": tally.repaired,
        }  # fmt: skip
        write_text(part.folder / INDEX, json.dumps(about) + "\n")
    progress.message(f"tokenized {plural(writer.documents, 'document')}: {plural(writer.tokens, 'token')}")
    for note in tally.notes():
        progress.message(note)


def unreadable_again(folder: Path) -> WorkError:
    """Returns the error for a stream that was written and is not there."""
    return WorkError(f"{folder} does not hold what was written into it; check the disk and run the command again")


def _shards(part: Part, encoder: Encoder, writer: _Writer, pieces: Iterator[Piece], pool: Pool | None) -> Iterator[int]:
    """Writes the shards that do not exist yet, one at each turn."""
    limit = part.limit
    if limit is not None and writer.tokens >= limit:
        return
    for batch in encode_all(encoder, pieces, skip=writer.pieces, pool=pool):
        for one in batch:
            if writer.add(one, None if limit is None else limit - writer.tokens):
                yield writer.tokens
        if limit is not None and writer.tokens >= limit:
            break
    if writer.flush():
        yield writer.tokens


class _Writer:
    """Collects tokens and writes a shard as soon as there are enough for one; continues after the complete shards of an
    earlier process.
    """

    def __init__(self, folder: Path, how: Tokenizing, check: Callable[[], None]) -> None:
        """Begins behind the shards of a folder; `check` raises where what was read may not be written."""
        self.folder, self.shard_tokens, self.check = folder, how.shard_tokens, check
        self.dtype = np.dtype(np.uint32 if how.vocabulary > 1 << 16 else np.uint16)
        self.number = self.tokens = self.pieces = self.documents = 0
        self.refused: list[str] = []
        self._waiting: list[Encoded] = []
        self._count = 0
        for index in _whole_shards(folder):
            self.number, self.tokens = self.number + 1, self.tokens + index.tokens
            self.pieces, self.documents = index.pieces, index.documents
            self.refused += index.refused

    def add(self, one: Encoded, room: int | None) -> bool:
        """Takes the tokens of a piece, at most `room`. Returns whether a shard was written."""
        if room is not None and room <= 0:
            return False
        if room is not None and len(one.ids) > room:
            one = replace(one, ids=one.ids[:room], learnt=None if one.learnt is None else one.learnt[:room])
        self._waiting.append(one)
        self._count += len(one.ids)
        self.tokens += len(one.ids)
        return self._count >= self.shard_tokens and self.flush()

    def flush(self) -> bool:
        """Writes the collected tokens; does nothing, and returns False, where there are none and a shard exists already."""
        if not self._waiting and self.number:
            return False
        self.check()
        waiting, self._waiting, self._count = self._waiting, [], 0
        ids = np.concatenate([np.zeros(0, np.uint32), *(one.ids for one in waiting)])
        largest = _largest(ids, waiting)
        if largest.id > (1 << 8 * self.dtype.itemsize) - 1:
            self.dtype = np.dtype(np.uint32)
        refused = [one.error for one in waiting if one.error is not None]
        self.pieces += len(waiting)
        self.documents += sum(one.ends and one.error is None for one in waiting)
        self.refused += refused
        write_shard(
            self.folder, self.number, ids.astype(self.dtype), _marks(waiting),
            pieces=self.pieces, documents=self.documents, refused=refused, largest=largest,
        )  # fmt: skip
        self.number += 1
        return True


def _largest(ids: Array, waiting: list[Encoded]) -> Largest:
    if not len(ids):
        return Largest()
    place, largest = int(ids.argmax()), int(ids.max())
    ends = np.cumsum([len(one.ids) for one in waiting])
    return Largest(largest, waiting[int(np.searchsorted(ends, place, side="right"))].where)


def _marks(waiting: list[Encoded]) -> Array | None:
    """Returns the marks of the tokens that are learnt; None where all are."""
    if all(one.learnt is None for one in waiting):
        return None
    return np.concatenate([np.ones(len(one.ids), bool) if one.learnt is None else one.learnt for one in waiting])


def _whole_shards(folder: Path) -> list[ShardIndex]:
    """Returns the indices of the shards, from the first on, that an earlier process has written, their contents
    checked.
    """
    found: list[ShardIndex] = []
    while True:
        try:
            index = read_shard_index(folder, len(found))
            if not is_whole(folder, len(found), index):
                shard_file(folder, len(found), "json").unlink()  # nobody is to read it until it is made again
                return found
        except (OSError, ValueError):
            return found
        found.append(index)


def _heard(source: Source, tally: Tally, progress: Progress) -> Iterator[Piece]:
    """Yields the documents and reports progress, in bytes where the files tell how many there are."""
    files = data_files(source) if source.kind in ("text", "jsonl") else []
    if not files or any(file.suffix in COMPRESSED for file in files):
        yield from iter_pieces(source, tally)
        return
    with progress.task("tokenize", sum(file.stat().st_size for file in files), "bytes") as task:
        for piece in iter_pieces(source, tally):
            yield piece
            content = piece.content
            whole = isinstance(content, str) and not content.isascii()
            task.advance(len(content.encode()) if whole and isinstance(content, str) else size_of(content))
