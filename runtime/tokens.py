"""The conversion of documents to one long stream of token ids, written once, in shards, and then memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minitron.runtime.models import Tokenizer, load_tokenizer
from minitron.specs.atomic import write_text, writing
from minitron.specs.cache import mark_used
from minitron.specs.data import Source
from minitron.specs.data_files import files_hash
from minitron.specs.documents.changes import Marks
from minitron.specs.documents.megatron import open_megatron
from minitron.specs.encoding import Encoder, recipe_of
from minitron.specs.errors import WorkError
from minitron.specs.locks import in_turn
from minitron.specs.progress import Progress
from minitron.specs.shards.stream import FORMAT_VERSION, INDEX, Array, Largest, Shards, TokenStream
from minitron.specs.shards.writer import TOKENIZING, Part, Tokenizing, unreadable_again, write_stream

_LAYOUT = 2
"""The version of the format, raised when the same documents would become another stream."""

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

    def tokenizing(self) -> Tokenizing:
        """Returns what writes streams with this tokenizer."""
        return Tokenizing(self.encoder, len(self.tokenizer))

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
    source: Source,
    content: str,
    encoder: TextEncoder,
    cache: Path,
    progress: Progress,
    *,
    limit: int | None = None,
    marks: Marks | None = None,
) -> TokenStream:
    """Returns all tokens of a resolved source (at most `limit`), one after the other, read-only and memory-mapped.
    `content` is the source's hash, and `marks` what its files looked like then.

    The first call writes the tokens to `cache`, every later one finds them there without opening the source. A call
    that was killed is resumed, and damaged shards are made again. Tokens of Megatron-LM are read in place.
    """
    if source.megatron is not None:
        return _megatron(source, content, encoder, cache, limit)
    folder = cache / stream_key(content, encoder, limit)
    stream = finished(folder, progress)
    if stream is not None:
        return stream
    # The cache is shared with the builds beside this one: another training may be writing the same stream.
    with in_turn(folder, TOKENIZING, progress.message):
        stream = finished(folder, progress)
        if stream is None:
            for _ in write_stream(Part(source, folder, limit, marks=marks), encoder.tokenizing(), progress):
                pass
            stream = finished(folder, progress)
    if stream is None:
        raise unreadable_again(folder)
    return stream


def finished(folder: Path, progress: Progress) -> TokenStream | None:
    """Opens the stream in a folder, and notes that it is used; None where it is missing, incomplete or damaged."""
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
        progress.message(f"the tokenized data is made again: {error}")
        (folder / INDEX).unlink(missing_ok=True)
        return None
    mark_used(folder)
    return stream


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
