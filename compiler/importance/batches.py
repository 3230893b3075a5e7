"""Batches of calibration samples, and how many of them wait between two layers."""

from __future__ import annotations

import torch

BATCH_TOKENS = 4096  # tokens that go through the graph at a time


BLOCK_BYTES = 1 << 30  # residual stream that is held between two layers


def batches_of(samples: torch.Tensor, hidden: int, *, one_at_a_time: bool = False) -> tuple[list[torch.Tensor], int]:
    """Samples as batches, of one sample each where they must be, and how many batches make a block."""
    size = 1 if one_at_a_time else batch_size(samples.shape[1])
    return list(torch.split(samples, size)), block_size(size, samples.shape[1], hidden)


def batch_size(length: int) -> int:
    """Samples of `length` tokens that go through the graph at a time."""
    return max(1, BATCH_TOKENS // length)


def block_size(sequences: int, length: int, hidden: int) -> int:
    """Batches that wait between two layers: the residual stream, its copy and the norm's output may live, in fp32."""
    return max(1, BLOCK_BYTES // (3 * 4 * sequences * length * hidden))


def compared_batches(tokens: int, vocabulary: int) -> int:
    """Batches whose logits wait, in fp32, to be compared with those that each dropped layer leads to."""
    return max(1, BLOCK_BYTES // (4 * tokens * vocabulary))
