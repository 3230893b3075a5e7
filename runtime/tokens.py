"""Documents to one long stream of token ids, written once and then memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron.runtime.disk import writing
from minitron.runtime.models import Tokenizer, load_tokenizer
from minitron.specs.atomic import atomic_folder
from minitron.specs.data import Source
from minitron.specs.documents import Document, data_files, iter_documents
from minitron.specs.errors import WorkError
from minitron.specs.progress import Progress

_LAYOUT = 1
"""Counts up when the same documents would become another stream."""

_BATCH_CHARACTERS = 1 << 20

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)

TokenArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer, and what stands around each document: BOS where the tokenizer itself puts it, EOS where there is
    one."""

    tokenizer: Tokenizer
    fingerprint: str
    bos: int | None
    eos: int | None

    @classmethod
    def load(cls, folder: Path) -> TextEncoder:
        tokenizer = load_tokenizer(folder)
        digest = hashlib.sha256()
        for file in sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}):
            digest.update(f"\n{file.name} ".encode() + hashlib.sha256(file.read_bytes()).digest())
        ids = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        return cls(
            tokenizer, digest.hexdigest(), bos if bos is not None and ids[:1] == [bos] else None, tokenizer.eos_token_id
        )

    def encode(self, documents: list[Document]) -> list[list[int]]:
        """Token ids of each document, BOS and EOS included. WorkError for chat data that the template refuses."""
        texts = [document if isinstance(document, str) else self._render(document) for document in documents]
        encoded = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [self._framed(ids) for ids in encoded]

    def text(self, ids: Sequence[int]) -> str:
        """What a model wrote, without its special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _framed(self, ids: list[int]) -> list[int]:
        # A chat template may have written them already.
        before = [self.bos] if self.bos is not None and ids[:1] != [self.bos] else []
        after = [self.eos] if self.eos is not None and ids[-1:] != [self.eos] else []
        return [*before, *ids, *after]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if self.tokenizer.chat_template is None:
            raise WorkError(
                "the data is chat messages and the tokenizer has no chat template; add chat_template.jinja to the "
                "tokenizer's folder, or name a `text_field`"
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program: it raises what it likes
            raise WorkError(
                f"the tokenizer's chat template cannot render a document ({error}); check its messages"
            ) from None


def stream_key(content: str, encoder: TextEncoder, limit: int | None) -> str:
    """Names the stream of a source: the same for the same contents (`content_hash`), tokenizer and limit, wherever they
    lie."""
    parts = [str(_LAYOUT), content, encoder.fingerprint, str(limit)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def token_stream(
    source: Source, content: str, encoder: TextEncoder, cache: Path, progress: Progress, *, limit: int | None = None
) -> TokenArray:
    """All tokens of a resolved source (at most `limit`), one after the other, read-only and memory-mapped. `content` is
    the source's hash.

    The first call writes them to `cache`, every later one finds them there, without a look at the source.
    """
    folder = cache / stream_key(content, encoder, limit)
    wide = len(encoder.tokenizer) > 1 << 16
    if not folder.is_dir():
        with writing(str(folder)), atomic_folder(folder) as temporary:
            dtype = np.dtype(np.uint32 if wide else np.uint16)
            with (temporary / "tokens.bin").open("wb") as file:
                documents, tokens = _write(_heard(source, progress), encoder, file, dtype, limit)
            about = {"format_version": _LAYOUT, "tokens": tokens, "documents": documents, "dtype": dtype.name}
            (temporary / "stream.json").write_text(json.dumps(about), encoding="utf-8")
        progress.message(f"tokenized {documents} documents: {tokens} tokens")
    try:
        about = json.loads((folder / "stream.json").read_text(encoding="utf-8"))
        stream: TokenArray = np.memmap(folder / "tokens.bin", np.dtype(about["dtype"]), "r")
    except (OSError, ValueError, KeyError) as error:
        raise WorkError(f"{folder}: the tokenized data cannot be read ({error}); delete that folder") from None
    if len(stream) != about["tokens"]:
        raise WorkError(
            f"{folder}: the tokenized data has {len(stream)} of {about['tokens']} tokens; delete that folder"
        )
    return stream


def _heard(source: Source, progress: Progress) -> Iterator[Document]:
    """The documents, with progress in bytes where the files tell how many there are."""
    if source.kind not in ("text", "jsonl"):
        yield from iter_documents(source)
        return
    with progress.task("tokenize", sum(file.stat().st_size for file in data_files(source)), "bytes") as task:
        for document in iter_documents(source):
            yield document
            task.advance(len(document.encode()) if isinstance(document, str) else len(json.dumps(document)))


def _write(
    documents: Iterable[Document], encoder: TextEncoder, file: Any, dtype: np.dtype[Any], limit: int | None
) -> tuple[int, int]:
    """Returns how many documents and tokens were written."""
    count, written = 0, 0
    for batch in _batches(documents):
        for ids in encoder.encode(batch):
            room = len(ids) if limit is None else min(len(ids), limit - written)
            file.write(np.asarray(ids[:room], dtype).tobytes())
            count, written = count + 1, written + room
            if written == limit:
                return count, written
    return count, written


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough at a time for a tokenizer that works in parallel, never more than fits in memory."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document) if isinstance(document, str) else sum(len(str(message)) for message in document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
