"""The block `importance`: how the compiler chooses what to keep."""

from __future__ import annotations

from typing import Literal

from minitron.specs.blocks.base import LONGEST_SEQUENCE, Block, PositiveInt, SequenceLength
from minitron.specs.data import DataSource

Aggregation = Literal["l2", "mean", "var"]


class CalibrationData(DataSource):
    """The documents whose activations are measured, and the amount of them."""

    samples: PositiveInt = 1024
    """Number of sequences."""

    sequence_length: SequenceLength = LONGEST_SEQUENCE
    """Tokens in a sequence. Left out: 4096, or fewer where the teacher reads fewer."""


class WidthScores(Block):
    """The aggregation of activations into one score for each channel, head and neuron (Minitron, arXiv 2407.14679,
    section 2.2)."""

    batch: Aggregation = "l2"
    """Aggregation over the samples."""

    sequence: Aggregation = "mean"
    """Aggregation over the tokens of a sample, of absolute values."""


class DepthScores(Block):
    """The ranking of layers (Minitron, arXiv 2407.14679, section 2.2)."""

    metric: Literal["block_influence", "loss", "logit_mse"] = "block_influence"
    """`block_influence`: how much a layer turns the residual stream; `loss`, `logit_mse`: the harm of dropping it."""

    contiguous: bool = False
    """Leave out one run of neighbouring layers rather than the lowest-scored ones."""

    greedy: bool = False
    """Drop one layer after the other and score the remaining ones again after each, for `loss` and `logit_mse`: of two layers
    that do the same, one stays. Takes as many passes as layers for each that is dropped."""


class Importance(Block):
    """The choice of channels, heads, neurons and layers to keep."""

    data: CalibrationData | None = None
    """Calibration data, where scores decide something. Left out: that of `distill.data`, in sequences of the same length."""

    width: WidthScores = WidthScores()
    """Scores of channels, heads and neurons."""

    depth: DepthScores = DepthScores()
    """Scores of layers."""

    selection: Literal["scores", "greedy"] = "scores"
    """`scores`: the highest stay; `greedy`: heads, key-value groups and neurons are eliminated one by one, always the one that
    a refit of the others makes up for best, which goes with `recovery.refit`; experts, always the one without which the outputs
    of its layer change least. Channels and layers stay by scores."""

    hidden_basis: Literal["channels", "principal"] = "channels"
    """`channels`: the residual stream loses channels (Minitron); `principal`: it is rotated onto its principal
    components first, which changes no logit, and loses the last of them (SliceGPT, arXiv 2401.15024, with one rotation for
    the network). For models whose norms take the root mean square and stand before what reads them."""

    untie: bool = False
    """The student's head gets a matrix of its own where the teacher's is tied to the embedding; the plan has its price. With
    `hidden_basis: principal` a head that stays tied shares one matrix that is fitted to both of its uses."""
