"""The number of tokens in a chunk of the distillation loss: the runtime allocates by it, the planner estimates by it."""

from __future__ import annotations

from dataclasses import dataclass

LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""One model's buffer of fp32 logits. 256 MiB are 512 tokens of a vocabulary of 131,072: a product of that many rows reads
the head once for 400 operations a byte, twice what an H200 needs to be busy. On a CPU it stays small."""

GRADIENT_BYTES = 512 << 20
"""The buffer of bf16 gradients on CUDA, 2,048 tokens of the same vocabulary. The head's gradient is read and written
once for each time that the buffer is full, so that it has to be larger than the logits'."""

BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Logits that torch's formulas handle at a time. On a CPU 8 MiB: the temporaries stay in the shared cache, and the pieces
are not so small that threads spend their time waiting for each other. On CUDA, where they run without Triton alone, 128
MiB."""

HEAD_BLOCK = 16384
"""Rows of a head that are upcast at a time on a CPU: 16384 x 4096 fp32 are 256 MiB."""


SHARED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""The teacher's logits that candidates of a search share: a tenth of a device's memory and less, 4,096 tokens of a vocabulary
of 131,072. The tokens beyond are multiplied for each candidate."""


@dataclass(frozen=True)
class LossChunks:
    """The number of tokens whose logits exist together, and the number whose gradients do: a multiple of the first."""

    logits: int
    gradients: int


def loss_chunks(kind: str, tokens: int, vocabulary: int, most: int, gradient_bytes: int) -> LossChunks:
    """Chooses the chunk sizes: `kind` is cpu or cuda, `most` is the largest chunk of logits, `gradient_bytes` is the
    size of one gradient (4 if it replaces its logit in memory)."""
    chunk = logits_chunk(kind, tokens, vocabulary, most)
    if gradient_bytes == 4:
        return LossChunks(chunk, chunk)
    most_chunks = max(1, GRADIENT_BYTES // (gradient_bytes * vocabulary * chunk))
    return LossChunks(chunk, chunk * min(most_chunks, max(1, -(-tokens // chunk))))


def logits_chunk(kind: str, tokens: int, vocabulary: int, most: int) -> int:
    """Returns the number of tokens whose logits exist together."""
    return max(1, min(most, tokens, LOGITS_BYTES[kind] // (4 * vocabulary)))
