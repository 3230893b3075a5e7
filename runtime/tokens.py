"""The conversion of documents to one long stream of token ids, written once, in shards, and then memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from minitron.runtime.disk import writing
from minitron.runtime.models import Tokenizer, load_tokenizer
from minitron.runtime.stream import (
    FORMAT_VERSION,
    INDEX,
    Array,
    Largest,
    ShardIndex,
    Shards,
    TokenStream,
    read_shard_index,
    write_shard,
)
from minitron.specs.atomic import remove_leftovers, write_text
from minitron.specs.cache import mark_used
from minitron.specs.data import Source
from minitron.specs.data_files import files_hash
from minitron.specs.documents import Piece, Tally, data_files, iter_pieces, size_of
from minitron.specs.documents.megatron import open_megatron
from minitron.specs.documents.opening import COMPRESSED
from minitron.specs.encoding import Encoded, Encoder, recipe_of
from minitron.specs.encoding.pool import encode_all
from minitron.specs.errors import WorkError
from minitron.specs.locks import in_turn
from minitron.specs.one_line import plural
from minitron.specs.progress import Progress

_LAYOUT = 2
"""The version of the format, raised when the same documents would become another stream."""

_SHARD_TOKENS = 1 << 24
"""The tokens of a shard: a few seconds of work, which is the loss when a process is killed, and at most 200 MB while it
is written.
"""

_SCANNED = 1 << 24
"""The tokens in memory at one time during the search for the largest."""

_CHECKED_BYTES = 1 << 30
"""The size up to which a stream is checked whole when it is opened; of a larger one each block is checked when it is
first read.
"""

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, and the special tokens around each document: BOS where the tokenizer itself adds it, EOS where there
    is one.
    """

    tokenizer: Tokenizer
    fingerprint: str
    encoder: Encoder

    @property
    def bos(self) -> int | None:
        return self.encoder.recipe.bos

    @classmethod
    def load(cls, folder: Path) -> TextEncoder:
        tokenizer = load_tokenizer(folder)
        files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
        return cls(tokenizer, files_hash(files), Encoder(recipe_of(tokenizer), tokenizer))

    def text(self, ids: Sequence[int]) -> str:
        """Decodes a model's output, without its special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def stream_key(content: str, encoder: TextEncoder, limit: int | None) -> str:
    """Returns the name of a source's stream: the same for the same contents (`content_hash`), tokenizer and limit, in
    whichever folder they lie.
    """
    parts = [str(_LAYOUT), content, encoder.fingerprint, str(limit)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def token_stream(
    source: Source, content: str, encoder: TextEncoder, cache: Path, progress: Progress, *, limit: int | None = None
) -> TokenStream:
    """Returns all tokens of a resolved source (at most `limit`), one after the other, read-only and memory-mapped.
    `content` is the source's hash.

    The first call writes the tokens to `cache`, every later one finds them there without opening the source. A call
    that was killed is resumed, and damaged shards are made again. Tokens of Megatron-LM are read in place.
    """
    if source.megatron is not None:
        return _megatron(source, content, encoder, cache, limit)
    folder = cache / stream_key(content, encoder, limit)
    stream = _finished(folder, progress)
    if stream is not None:
        mark_used(folder)
        return stream
    # The cache is shared with the builds beside this one: another training may be writing the same stream.
    with in_turn(folder, "tokenizing", progress.message):
        stream = _finished(folder, progress)
        return _tokenized(source, encoder, folder, limit, progress) if stream is None else stream


def _tokenized(
    source: Source, encoder: TextEncoder, folder: Path, limit: int | None, progress: Progress
) -> TokenStream:
    """Writes the stream of a source to `folder`, after what an earlier process has written of it."""
    with writing(str(folder)):
        remove_leftovers(folder)
        writer = _Writer(folder, len(encoder.tokenizer), progress)
        tally = _write(source, encoder.encoder, writer, limit, progress)
        about = {
            "format_version": FORMAT_VERSION, "shards": writer.number, "tokens": writer.tokens,
            "documents": writer.documents, "empty": tally.empty, "skipped": tally.skipped, "repaired": tally.repaired,
        }  # fmt: skip
        write_text(folder / INDEX, json.dumps(about) + "\n")
    stream = TokenStream.open(folder, writer.number)
    progress.message(f"tokenized {plural(writer.documents, 'document')}: {plural(len(stream), 'token')}")
    for note in tally.notes():
        progress.message(note)
    return stream


def _finished(folder: Path, progress: Progress) -> TokenStream | None:
    """Opens the stream in a folder; None where it is missing, incomplete or damaged."""
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if about["format_version"] != FORMAT_VERSION:
            return None
        stream = TokenStream.open(folder, int(about["shards"]))
        size = sum(array.nbytes for array in stream.tokens.arrays)
        for part in (stream.tokens, stream.learnt):
            if part is not None and size <= _CHECKED_BYTES:
                part.check_all()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, WorkError) as error:
        progress.message(f"the tokenized data is made anew: {error}")
        (folder / INDEX).unlink(missing_ok=True)
        return None
    return stream


def _write(source: Source, encoder: Encoder, writer: _Writer, limit: int | None, progress: Progress) -> Tally:
    """Writes the shards that do not exist yet, and counts the documents that were left out."""
    tally = Tally()
    if limit is None or writer.tokens < limit:
        for batch in encode_all(encoder, _heard(source, tally, progress), skip=writer.pieces):
            for one in batch:
                writer.add(one, None if limit is None else limit - writer.tokens)
            if limit is not None and writer.tokens >= limit:
                break
        writer.flush()
    for reason in writer.refused:
        tally.skip(reason)
    return tally


class _Writer:
    """Collects tokens and writes a shard as soon as there are enough for one; continues after the complete shards of an
    earlier process.
    """

    def __init__(self, folder: Path, vocabulary: int, progress: Progress) -> None:
        self.folder = folder
        self.dtype = np.dtype(np.uint32 if vocabulary > 1 << 16 else np.uint16)
        self.number = self.tokens = self.pieces = self.documents = 0
        self.refused: list[str] = []
        self._waiting: list[Encoded] = []
        self._count = 0
        for index in _whole_shards(folder):
            self.number, self.tokens = self.number + 1, self.tokens + index.tokens
            self.pieces, self.documents = index.pieces, index.documents
            self.refused += index.refused
        if self.number:
            progress.message(f"going on with the tokenized data after {self.tokens} tokens")

    def add(self, one: Encoded, room: int | None) -> None:
        if room is not None and room <= 0:
            return
        if room is not None and len(one.ids) > room:
            one = replace(one, ids=one.ids[:room], learnt=None if one.learnt is None else one.learnt[:room])
        self._waiting.append(one)
        self._count += len(one.ids)
        self.tokens += len(one.ids)
        if self._count >= _SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes the collected tokens; does nothing where there are none and a shard exists already."""
        if not self._waiting and self.number:
            return
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
            stream = TokenStream.of(folder, [*found, index])
            for part in (stream.tokens, stream.learnt):
                if part is not None:
                    part.check(len(found))
        except (OSError, ValueError, WorkError):
            return found
        found.append(index)


def _megatron(source: Source, content: str, encoder: TextEncoder, cache: Path, limit: int | None) -> TokenStream:
    """Opens tokens of Megatron-LM in place; `cache` keeps the largest token id, which only reading all tokens gives."""
    assert source.megatron is not None
    arrays = [open_megatron(Path(entry)).tokens for entry in source.megatron]
    known = cache / f"{stream_key(content, encoder, None)}.json"
    try:
        largest = Largest(**json.loads(known.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        largest = max(
            (_largest_mapped(array, entry) for array, entry in zip(arrays, source.megatron, strict=True)),
            key=lambda one: one.id,
        )
        with writing(str(known)):
            write_text(known, json.dumps(asdict(largest)) + "\n")
    if limit is not None:
        ends = np.cumsum([len(array) for array in arrays])
        rooms = [max(0, limit - int(end) + len(array)) for array, end in zip(arrays, ends, strict=True)]
        arrays = [array[:room] for array, room in zip(arrays, rooms, strict=True)]
    return TokenStream(Shards(arrays, [[] for _ in arrays], cache, "tokens"), None, largest)


def _largest_mapped(array: Array, where: str) -> Largest:
    parts = (array[start : start + _SCANNED] for start in range(0, len(array), _SCANNED))
    smallest, largest = 0, -1
    for part in parts:
        smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
    if smallest < 0:
        raise WorkError(f"{where}: holds the token {smallest}; token ids begin with 0")
    return Largest(largest, where)


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
