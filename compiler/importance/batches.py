"""Batches of calibration samples."""

from __future__ import annotations

import torch

BATCH_TOKENS = 4096  # tokens that go through the graph at a time on a CPU

BLOCK_BYTES = 1 << 30  # residual stream of the samples that elimination and refits look at


def batches_of(samples: torch.Tensor, hidden: int) -> tuple[list[torch.Tensor], int]:
    """Samples as batches, and how many of these are of the samples that refits and elimination look at."""
    size = batch_size(samples.shape[1])
    return list(torch.split(samples, size)), block_size(size, samples.shape[1], hidden)


def batch_size(length: int) -> int:
    """Samples of `length` tokens that go through the graph at a time."""
    return max(1, BATCH_TOKENS // length)


def block_size(sequences: int, length: int, hidden: int) -> int:
    """Batches whose residual stream, its copy and the norm's output, in fp32, make BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // (3 * 4 * sequences * length * hidden))
