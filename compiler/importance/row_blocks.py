"""Blocks of activations that stay in a CPU's cache while several operations pass over them."""

from __future__ import annotations

import torch

BLOCK_ELEMENTS = 1 << 18
"""1 MiB in fp32. A temporary of this size is in the cache when the next operation reads it, and the allocator hands it out
again without asking the kernel for new pages, which takes longer than the sums do."""


def row_blocks(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits [.., rows, channels] along the rows, by the number of channels alone: sums do not depend on what else is in a
    batch. A GPU has its values whole: there a launch costs more than a pass."""
    if value.device.type != "cpu":
        return (value,)
    return torch.split(value, max(1, BLOCK_ELEMENTS // value.shape[-1]), dim=-2)
