"""Blocks of rows: of activations that stay in a CPU's cache, and of matrices that are fitted in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

FITTED_ROWS, FITTED_ELEMENTS = 256, 1 << 22
"""The rows of a matrix that are fitted at a time: 32 MB in float64, and enough of them to fill the cores."""

BLOCK_ELEMENTS = 1 << 18
"""1 MiB in fp32. A temporary of this size is in the cache when the next operation reads it, and the allocator hands it out
again without asking the kernel for new pages, which takes longer than the sums do."""


def row_blocks(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits [.., rows, channels] along the rows, by the number of channels alone: sums do not depend on what else is in a
    batch. A GPU has its values whole: there a launch costs more than a pass."""
    if value.device.type != "cpu":
        return (value,)
    return torch.split(value, max(1, BLOCK_ELEMENTS // value.shape[-1]), dim=-2)


def fitted_at_once(width: int) -> int:
    """Returns the number of rows, `width` wide, that are fitted at a time."""
    return max(FITTED_ROWS, FITTED_ELEMENTS // width)


def fitted_rows(count: int, width: int) -> Iterator[slice]:
    """Yields the rows of a matrix that are fitted at a time: a head has as many as there are tokens."""
    size = fitted_at_once(width)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
