"""Calibration samples: documents -> token sequences of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from minitron.specs.documents import DataSource, Document, iter_documents
from minitron.specs.errors import UsageError, WorkError

POOL = 8  # sequences read for each one used, so that the samples come from all over the data


POOL_TOKENS = 20_000_000  # and at most so many tokens, since they are held in memory


@dataclass(frozen=True)
class SampleConfig:
    """How many sequences of how many tokens."""

    samples: int
    sequence_length: int


def calibration_samples(source: DataSource, tokenizer: Any, vocab_size: int, config: SampleConfig) -> torch.Tensor:
    """Token ids [samples, sequence_length], int64; fewer samples where the data has no more.

    Documents follow each other, separated by the end-of-text token; every sequence begins with the token that the
    tokenizer puts first, because models that were trained so are off without it.
    """
    first = _first_token(tokenizer)
    room = config.sequence_length - len(first)
    wanted = min(config.samples * POOL, max(config.samples, POOL_TOKENS // config.sequence_length))
    stream: list[int] = []
    chunks: list[list[int]] = []
    for tokens in _tokens(iter_documents(source), tokenizer):
        stream += tokens
        while len(stream) >= room and len(chunks) < wanted:
            chunks.append(first + stream[:room])
            stream = stream[room:]
        if len(chunks) >= wanted:
            break
    if not chunks:
        raise WorkError(
            f"the calibration data has fewer than {config.sequence_length} tokens; name more data, or a shorter sequence_length"
        )
    count = min(config.samples, len(chunks))
    ids = torch.tensor([chunks[i * len(chunks) // count] for i in range(count)], dtype=torch.long)
    if int(ids.max()) >= vocab_size:
        raise UsageError(
            f"the tokenizer yields token {int(ids.max())}, and the teacher's vocabulary has {vocab_size}: "
            "tokenizer and model do not belong together"
        )
    return ids


def _first_token(tokenizer: Any) -> list[int]:
    ids = list(tokenizer("a").input_ids)
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _tokens(documents: Iterable[Document], tokenizer: Any) -> Iterator[list[int]]:
    end = tokenizer.eos_token_id
    for document in documents:
        if not isinstance(document, str):
            if not getattr(tokenizer, "chat_template", None):
                raise UsageError(
                    "the data has chat messages and the teacher's tokenizer has no chat template; name text_field"
                )
            document = str(tokenizer.apply_chat_template(document, tokenize=False))
        ids = list(tokenizer(document, add_special_tokens=False, verbose=False).input_ids)
        yield ids if end is None else [*ids, end]
