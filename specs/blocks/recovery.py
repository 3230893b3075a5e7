"""The block `recovery`: repairs before any training."""

from __future__ import annotations

from typing import Literal

from minitron.specs.blocks.base import Block


class Recovery(Block):
    """Closed-form repair from the calibration activations, before any training."""

    refit: Literal["none", "least_squares"] = "none"
    """`least_squares`: projections that read or write a narrowed axis are fitted to what the teacher's yield, layer by layer,
    each on what the student itself yields up to there. Stacked experts, biases and tied matrices stay as they are cut."""

    merge_heads: bool = False
    """The residual of dropped query heads is folded into the kept ones (multi-head attention only)."""
