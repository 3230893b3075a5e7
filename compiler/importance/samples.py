"""Calibration samples: documents -> token sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minitron.specs.documents import DataSource, iter_pieces
from minitron.specs.encoding import Encoder, recipe_of
from minitron.specs.encoding.pool import encode_all
from minitron.specs.errors import UsageError, WorkError

POOL = 8  # sequences read for each one used, so that the samples come from all over the data

POOL_TOKENS = 20_000_000  # and no more tokens than this, since they are held in memory


@dataclass(frozen=True)
class SampleConfig:
    """The number of calibration sequences and their length in tokens."""

    samples: int
    sequence_length: int


def calibration_samples(source: DataSource, tokenizer: Any, vocab_size: int, config: SampleConfig) -> torch.Tensor:
    """Token ids [samples, sequence_length], int64; fewer samples where the data has no more.

    Documents follow each other as in training, BOS before and EOS after each where the tokenizer has them; every sequence
    begins with BOS once, because models that were trained so are off without it. Nothing is read beyond what is needed.
    """
    encoder = Encoder(recipe_of(tokenizer), tokenizer)
    length = config.sequence_length
    wanted = min(config.samples * POOL, max(config.samples, POOL_TOKENS // length))
    rows = []
    for row in _rows(_tokens(source, encoder, vocab_size, tokenizer), length, encoder.recipe.bos):
        rows.append(row)
        if len(rows) >= wanted:
            break
    if not rows:
        raise WorkError(
            f"the calibration data has fewer than {length} tokens; name more data, or a shorter sequence_length"
        )
    count = min(config.samples, len(rows))
    return torch.from_numpy(np.stack([rows[i * len(rows) // count] for i in range(count)]))


def _tokens(source: DataSource, encoder: Encoder, vocab_size: int, tokenizer: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The stream that training would read, in parts. Raises UsageError for a token that the model does not have."""
    for batch in encode_all(encoder, iter_pieces(source), processes=1, small=_HERE):
        for one in batch:
            if len(one.ids) and int(one.ids.max()) >= vocab_size:
                token = int(one.ids.max())
                raise UsageError(
                    f"{one.where} yields token {token} (`{tokenizer.convert_ids_to_tokens(token)}`), and the teacher's "
                    f"vocabulary has {vocab_size}; leave that document out, or copy the tokenizer that belongs to the model"
                )
            yield one.ids.astype(np.int64)


_HERE = 1 << 62
"""Characters that are encoded in this process: all of them, since reading stops early. (Chat templates run in another.)"""


def _rows(parts: Iterator[np.ndarray[Any, Any]], length: int, bos: int | None) -> Iterator[np.ndarray[Any, Any]]:
    """Consecutive sequences of the stream; each begins with BOS, its own or one that is put there."""
    stream = np.zeros(0, np.int64)
    for part in parts:
        stream = np.concatenate([stream, part])
        start = 0
        while len(stream) - start >= length:
            if bos is None or stream[start] == bos:
                row, start = stream[start : start + length], start + length
            else:
                row = np.concatenate([[bos], stream[start : start + length - 1]])
                start += length - 1
            yield row
        stream = stream[start:]
