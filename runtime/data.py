"""Samples of a fixed length out of token streams, in an order that only (seed, global sample index) decides.

Documents are packed: a stream is one document after the other, with BOS before and EOS after each where the tokenizer
has them, and a sample is the next n tokens of the stream, wherever documents begin and end. Attention reaches back to
the beginning of the sample, across documents, and positions count from there, as in the pretraining of the models that
are distilled: they learn from BOS and EOS where a document ends. So there is no mask but the causal one, and any
attention kernel will do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitron.runtime.order import blend_place, blend_quotas, mix, shuffled, shuffled_in_blocks
from minitron.runtime.tokens import TextEncoder, stream_key, token_stream
from minitron.specs.data import BlendPart, DataSource, Source
from minitron.specs.documents import content_hash
from minitron.specs.documents.changes import marks_of
from minitron.specs.errors import WorkError
from minitron.specs.progress import Progress
from minitron.specs.shards.growing import GrowingStream
from minitron.specs.shards.stream import NOTHING, Array, Largest, Tokens, TokenStream
from minitron.specs.shards.writer import Part


@dataclass(frozen=True)
class Batch:
    """B sequences of L tokens: the tokens that are read, the next token at each position, and a mask of the positions
    that predict a token.
    """

    input_ids_BL: Tensor
    labels_BL: Tensor
    valid_BL: Tensor
    rows_T: Tensor | None
    """The positions in the flattened batch that predict a token; None stands for all of them."""

    @classmethod
    def of(cls, input_ids_BL: Tensor, labels_BL: Tensor, valid_BL: Tensor) -> Batch:
        rows_T = None if bool(valid_BL.all()) else valid_BL.flatten().nonzero().squeeze(1)
        return cls(input_ids_BL, labels_BL, valid_BL, rows_T)

    def pick(self, values_BL: Tensor) -> Tensor:
        """Returns the values [T, ...] at the positions that predict a token. (Not with a boolean mask: its gradient
        sorts.)
        """
        flat = values_BL.flatten(0, 1)
        return flat if self.rows_T is None else flat.index_select(0, self.rows_T)

    def micro_batches(self, size: int) -> Iterator[Batch]:
        for start in range(0, self.input_ids_BL.shape[0], size):
            part = slice(start, start + size)
            yield Batch.of(self.input_ids_BL[part], self.labels_BL[part], self.valid_BL[part])

    def to(self, device: torch.device) -> Batch:
        """Copies the batch to `device`; from pinned memory without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Copies the batch to pinned memory, which a GPU can read by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        rows_T = None if self.rows_T is None else change(self.rows_T)
        return Batch(change(self.input_ids_BL), change(self.labels_BL), change(self.valid_BL), rows_T)


@dataclass(frozen=True)
class Windows:
    """A token stream cut into sequences of `length` so that every token is predicted once.

    Without BOS a window reads `length` tokens and predicts each one's successor; windows share no token that is
    predicted. With BOS every window begins with it, as the model was trained to see it (a Gemma without it loses a
    full nat), and predicts its own tokens; BOS itself is never predicted. What a window lacks at the end of the
    stream is masked.
    """

    stream: Tokens
    length: int
    bos: int | None
    learnt: Tokens | None = None
    """The mask of the tokens whose prediction is trained; None stands for all."""

    largest: Largest = NOTHING
    """The largest token of the stream: the models must have it in their vocabulary."""

    growing: GrowingStream | None = None
    """The stream, where its end may not be known yet; then windows are those that will not change."""

    def __len__(self) -> int:
        whole = self.growing is None or self.growing.ended  # first: what has ended does not grow
        predicted = max(0, len(self.stream) - (self.bos is None))
        return -(-predicted // self.length) if whole else predicted // self.length

    def has(self, window: int) -> bool:
        """Checks whether the window with this number is there, or the number of all windows is known."""
        return self.growing is None or self.growing.ended or window < len(self)

    def digest(self) -> str:
        """Returns a hash of all tokens that are read and learnt."""
        digest = hashlib.sha256()
        for part in (self.stream, self.learnt):
            digest.update(b"all" if part is None else np.ascontiguousarray(part[0 : len(part)]).tobytes())
        return digest.hexdigest()

    def window(self, index: int) -> tuple[Array, Array]:
        """Returns the tokens read and the tokens predicted: two arrays of equal length, at most `length`."""
        span = self._span(index)
        content = self.stream[span].astype(np.int64)
        if self.bos is None:
            return content[:-1], content[1:]
        if content[0] == self.bos:
            content = content[1:]
        return np.concatenate(([self.bos], content[:-1])).astype(np.int64)[: len(content)], content

    def _span(self, index: int) -> slice:
        """Returns the slice of the stream that a window consists of."""
        start = index * self.length
        return slice(start, start + self.length + (self.bos is None))

    def _valid(self, index: int, predicted: Array) -> Array:
        """Returns the mask of the predicted tokens that are learnt."""
        valid: Array = np.ones(len(predicted), bool) if self.bos is None else predicted != self.bos
        if self.learnt is None or not len(predicted):
            return valid
        marks: Array = self.learnt[self._span(index)].astype(bool)
        return valid & marks[-len(predicted) :]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the windows `indices`, padded with token 0 and masked. Padding stands last, where no causal model
        sees it.
        """
        inputs = np.zeros((len(indices), self.length), np.int64)
        labels, valid = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        for row, index in enumerate(indices):
            read, predicted = self.window(index)
            inputs[row, : len(read)], labels[row, : len(read)] = read, predicted
            valid[row, : len(read)] = self._valid(index, predicted)
        return Batch.of(torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy(valid))


@dataclass(frozen=True)
class Corpus:
    """The training data: one set of windows, or several that are mixed by quotas."""

    sources: tuple[Windows, ...]
    quotas: tuple[int, ...]
    seed: int
    block: int | None = None
    """The sequences of a block within which the first pass over a source is shuffled; None: all are shuffled at once."""

    @property
    def largest(self) -> Largest:
        """Returns the largest token id of all sources, as far as they are there."""
        return max(
            (one.largest if one.growing is None else one.growing.largest for one in self.sources),
            key=lambda one: one.id,
        )

    def ready(self, samples: Sequence[int]) -> bool:
        """Checks whether all that decides these global samples is there."""
        if self.block is None:
            return True
        numbers = map(self._number, samples)
        return all(
            self.sources[source].has(number - number % self.block + self.block - 1) for source, number in numbers
        )

    def place(self, sample: int) -> tuple[int, int]:
        """Returns source and window of the global sample with this index."""
        source, number = self._number(sample)
        size, seed = len(self.sources[source]), mix(self.seed, source)
        if self.block is None:
            return source, shuffled(number, size, seed)
        return source, shuffled_in_blocks(number, size, self.block, seed)

    def _number(self, sample: int) -> tuple[int, int]:
        """Returns the source of a global sample, and the number of samples of that source before it."""
        return (0, sample) if len(self.sources) == 1 else blend_place(sample, self.quotas, self.seed)

    def batch(self, samples: Sequence[int]) -> Batch:
        """Returns the global samples with these indices."""
        places = [self.place(sample) for sample in samples]
        rows = [self.sources[source].batch([window]) for source, window in places]
        return Batch.of(
            torch.cat([row.input_ids_BL for row in rows]),
            torch.cat([row.labels_BL for row in rows]),
            torch.cat([row.valid_BL for row in rows]),
        )


@dataclass(frozen=True)
class Data:
    """A resolved source, and for each of its parts a hash of everything that decides its documents: the hash reads all
    files, so the leader computes it once for all ranks.
    """

    source: DataSource
    contents: tuple[str, ...]

    @classmethod
    def read(cls, source: DataSource) -> Data:
        return cls(source, tuple(content_hash(part) for part in _parts(source)))


def _parts(data: DataSource) -> tuple[Source, ...]:
    return data.blend if data.blend is not None else (data,)


def _limits(data: DataSource, tokens: int) -> list[int | None]:
    """Returns the number of tokens to read of each part. A streamed data set may never end, so that only as many tokens
    as training can use are read of it. Other parts are read whole, so that a short training samples from all of them.
    """
    shares = [part.share for part in _parts(data)]
    whole = sum(shares)
    return [
        math.ceil(tokens * share / whole) + 1 if part.streaming else None
        for part, share in zip(_parts(data), shares, strict=True)
    ]


def data_hash(data: Data, encoder: TextEncoder, tokens: int) -> str:
    """Returns the hash of everything that decides the samples of a source, independent of the folder it lies in."""
    weights = [part.share for part in _parts(data.source)]
    limits = _limits(data.source, tokens)
    keys = [stream_key(content, encoder, limit) for content, limit in zip(data.contents, limits, strict=True)]
    return hashlib.sha256(repr((weights, keys)).encode()).hexdigest()


@dataclass(frozen=True)
class Wanted:
    """The sequences that a training draws from a source: their `length`, the `tokens` and the number of `samples` in all,
    and what decides their order.
    """

    length: int
    tokens: int
    seed: int
    block: int | None = None
    """The tokens of a block within which they are shuffled; None: all of them are shuffled at once."""

    samples: int = 0

    @property
    def block_samples(self) -> int | None:
        return None if self.block is None else self.block // self.length

    def until(self, quota: int, quotas: int) -> int | None:
        """Returns the tokens of a part that has `quota` of each `quotas` samples, up to the end of the last block that is
        drawn from; None: all of them.
        """
        if (block := self.block_samples) is None:
            return None
        drawn = self.samples if quota == quotas else -(-self.samples // quotas) * quota
        return -(-drawn // block) * block * self.length + 1  # where there is no BOS, the last token is predicted from


def open_corpus(data: Data, encoder: TextEncoder, cache: Path, wanted: Wanted, progress: Progress) -> Corpus:
    """Opens the samples of a source, tokenized on the first call. WorkError where there is nothing to predict."""
    windows = []
    for part in corpus_parts(data, encoder, cache, wanted):
        stream = token_stream(part.source, part.content, encoder, cache, progress, limit=part.limit, marks=part.marks)
        windows.append(_windows(stream, wanted.length, encoder))
    return _corpus(data, windows, wanted)


@dataclass(frozen=True)
class CorpusPart(Part):
    """A part of the training data, with the hash of what decides its documents."""

    content: str = ""


def corpus_parts(data: Data, encoder: TextEncoder, cache: Path, wanted: Wanted) -> list[CorpusPart]:
    """Returns the parts of a source with the folders of their tokens in `cache`, and how much of each is wanted."""
    quotas = _quotas(data)
    return [
        CorpusPart(
            source=part,
            folder=cache / stream_key(content, encoder, limit),
            limit=limit,
            until=wanted.until(quota, sum(quotas)),
            share=quota,
            marks=marks_of(part),
            content=content,
        )
        for part, content, limit, quota in zip(
            _parts(data.source), data.contents, _limits(data.source, wanted.tokens), quotas, strict=True
        )
    ]


def growing_corpus(
    data: Data, streams: Sequence[GrowingStream | TokenStream], encoder: TextEncoder, wanted: Wanted
) -> Corpus:
    """Makes the corpus of streams that may still grow, one for each part of the source."""
    windows = [
        _windows(stream, wanted.length, encoder)
        if isinstance(stream, TokenStream)
        else Windows(stream.tokens, wanted.length, encoder.bos, stream.learnt, growing=stream)
        for stream in streams
    ]
    return _corpus(data, windows, wanted)


def _quotas(data: Data) -> tuple[int, ...]:
    weights = [part.share for part in _parts(data.source) if isinstance(part, BlendPart)]
    return tuple(blend_quotas(weights)) if weights else (1,)


def _corpus(data: Data, windows: Sequence[Windows], wanted: Wanted) -> Corpus:
    return Corpus(tuple(windows), _quotas(data), wanted.seed, wanted.block_samples)


def open_held_out(
    data: DataSource,
    content: str,
    encoder: TextEncoder,
    cache: Path,
    *,
    length: int,
    max_tokens: int,
    progress: Progress,
) -> Windows:
    """Opens the first `max_tokens` tokens of a resolved source, in order; `content` is the source's hash."""
    limit = max_tokens + (encoder.bos is None)
    return _windows(token_stream(data, content, encoder, cache, progress, limit=limit), length, encoder)


def _windows(stream: TokenStream, length: int, encoder: TextEncoder) -> Windows:
    windows = Windows(stream.tokens, length, encoder.bos, stream.learnt, stream.largest)
    require_tokens(stream)
    return windows


def require_tokens(stream: Sized) -> None:
    """Checks that a whole stream has a token to predict. WorkError where it has none."""
    if len(stream) < 2:
        raise WorkError(f"the data has {len(stream)} tokens, too few to predict one from another; name more data")
