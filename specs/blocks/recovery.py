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
    """Folds the difference of a dropped head from the others into a kept one, W + (W - W_dropped) (Minitron, arXiv
    2407.14679, section 2.3). For attention whose heads have keys and values of their own, and without `refit`."""

    merge_experts: bool = False
    """A dropped expert is merged into the kept one whose mean output on the calibration data is nearest: neurons are aligned,
    then both are averaged, weighted by the tokens that each is sent (M-SMoE, arXiv 2310.01334). The router keeps the rows of
    the kept experts, as it does without."""
