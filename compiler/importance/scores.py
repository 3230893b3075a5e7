"""Importance scores from activations (Minitron, arXiv 2407.14679, section 2.2), accumulated batch by batch in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from minitron.compiler.importance.row_blocks import row_blocks
from minitron.compiler.roles.names import HEADS, HIDDEN, LAYERS
from minitron.specs.builds import COVARIANCE, EXPERT_OUTPUTS, EXPERT_TOKENS

Aggregation = Literal["l2", "mean", "var"]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WidthConfig:
    """The aggregations that turn activations into a score: over the tokens of a sample first, then over the samples."""

    batch: Aggregation = "l2"
    sequence: Aggregation = "mean"


@dataclass
class Accumulator:
    """The score of every channel of one value.

    `sequence` of |a| over the tokens of a sample gives one number a sample and channel; `batch` aggregates these. With
    the defaults: score[c] = sqrt(sum over samples of (mean over tokens of |a[c]|)^2).
    """

    config: WidthConfig
    samples: int = 0
    total: torch.Tensor | None = None
    squares: torch.Tensor | None = None

    def update(self, value_BSC: torch.Tensor) -> None:
        """Takes in the activations of one batch."""
        self.add(over_tokens(value_BSC, self.config.sequence))

    def add(self, per_sample_BC: torch.Tensor) -> None:
        """Takes in what the tokens of each sample came to."""
        total, squares = per_sample_BC.sum(0), per_sample_BC.square().sum(0)
        self.samples += per_sample_BC.shape[0]
        self.total, self.squares = _plus(self.total, total), _plus(self.squares, squares)

    def result(self) -> torch.Tensor:
        """The scores [C] on the CPU."""
        assert self.total is not None and self.squares is not None, "no sample was seen"
        if self.config.batch == "l2":
            score = self.squares.sqrt()
        elif self.config.batch == "mean":
            score = self.total / self.samples
        else:
            score = (self.squares / self.samples - (self.total / self.samples).square()).clamp_min(0)
        return score.cpu()


@dataclass
class Contributions:
    """The score of every expert (REAP, arXiv 2510.13999, its saliency score): the mean of |g f(x)| over the tokens sent to it.

    f(x) is what the expert yields and g the router's weight for it; an expert that no token is sent to has 0. `outputs` are the
    sums of g f(x) itself.
    """

    total: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def add(self, norms_E: torch.Tensor, tokens_E: torch.Tensor, outputs_EH: torch.Tensor | None = None) -> None:
        """Takes in sums over the tokens of each expert, of norms and, where they are asked for, of outputs, and how many these
        were."""
        self.total, self.tokens = _plus(self.total, norms_E.double()), _plus(self.tokens, tokens_E.double())
        if outputs_EH is not None:
            self.outputs = _plus(self.outputs, outputs_EH.double())

    def result(self) -> torch.Tensor:
        """The scores [E] on the CPU."""
        assert self.total is not None and self.tokens is not None, "no sample was seen"
        return (self.total / self.tokens.clamp_min(1)).float().cpu()

    def mean_outputs(self) -> torch.Tensor:
        """The mean of g f(x) over the tokens of each expert, [E, H] on the CPU."""
        assert self.outputs is not None and self.tokens is not None, "no sample was seen"
        return (self.outputs / self.tokens.clamp_min(1)[:, None]).float().cpu()


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    """The sum, where `more` is: what an earlier process saved comes from the CPU."""
    return more if total is None else total.to(more.device) + more


def over_owned_tokens(
    rows_NC: torch.Tensor, ends_E: torch.Tensor, members_BN: torch.Tensor, how: Aggregation
) -> torch.Tensor:
    """[N, C] -> [B, E, C]: rows stand expert by expert, up to `ends`; for each sample and expert, over all rows of the
    sample, which count as 0 where they are another expert's. `members` is 1 where a row is of a sample."""
    ends = ends_E.tolist()
    pieces = list(zip([0, *ends[:-1]], ends, strict=True))
    count_B11 = members_BN.sum(1).clamp_min(1)[:, None, None]

    def sums(values_NC: torch.Tensor) -> torch.Tensor:
        return torch.stack([members_BN[:, start:end] @ values_NC[start:end] for start, end in pieces], dim=1)

    if how == "mean":
        return sums(rows_NC) / count_B11
    squares = sums(rows_NC.square())
    return squares.sqrt() if how == "l2" else squares / count_B11 - (sums(rows_NC) / count_B11).square()


def over_experts(rows_NC: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """[N, C] -> [E, C]: the sums over the rows of each expert, which stand expert by expert, up to `ends`."""
    count = rows_NC.shape[0]
    return over_owned_tokens(rows_NC, ends_E, rows_NC.new_ones(1, count), "mean")[0] * count


def over_rows(rows_NC: torch.Tensor, members_BN: torch.Tensor, how: Aggregation) -> torch.Tensor:
    """[N, C] -> [B, C]: for each sample over its rows. `members` is 1 where a row is of a sample."""
    whole = torch.tensor([rows_NC.shape[0]])
    return over_owned_tokens(rows_NC, whole, members_BN, how)[:, 0]


def over_tokens(value_BSC: torch.Tensor, how: Aggregation) -> torch.Tensor:
    """[B, .., S, C] -> [B, .., C]: |a| over the tokens of each sample, summed in fp32.

    Block by block of tokens (`row_blocks`): a copy of all activations would cost several times what the sums do.
    """
    count = value_BSC.shape[-2]

    def of_sample(value_SC: torch.Tensor) -> torch.Tensor:
        blocks = row_blocks(value_SC)
        if how == "l2":
            return torch.stack([block.float().square().sum(-2) for block in blocks]).sum(0).sqrt()
        mean_C = torch.stack([block.float().abs().sum(-2) for block in blocks]).sum(0) / count
        if how == "mean":
            return mean_C
        return (
            torch.stack([(block.float().abs() - mean_C.unsqueeze(-2)).square().sum(-2) for block in blocks]).sum(0)
            / count
        )

    if value_BSC.device.type != "cpu":
        return of_sample(value_BSC)
    samples = value_BSC.reshape(-1, *value_BSC.shape[-2:])
    return torch.stack([of_sample(sample) for sample in samples]).reshape(*value_BSC.shape[:-2], -1)


@dataclass(frozen=True)
class Seen:
    """The experts of one layer on the calibration data: `tokens` [experts] that each was sent, and `outputs` [experts,
    hidden_size], the mean over these of what it adds to the residual stream, weighted by the router."""

    tokens: Scores
    outputs: Scores


@dataclass(frozen=True)
class ScoreTable:
    """Scores by axis.

    hidden   [hidden_size], the sum over the norms of the whole network
    heads    layer -> [groups, repeats]
    widths   axis name -> layer -> [width], or [parents, width] where each index of the parents may keep others
    layers   [layers], high: important
    covariance   `hidden`: [hidden_size, hidden_size], the mean over tokens and norms of x x^T for what a norm yields before
             its weight; `head`: the same of the norm before a tied head alone
    experts  layer -> what its experts were seen to do
    """

    hidden: Scores | None = None
    heads: Mapping[int, Scores] = field(default_factory=dict)
    widths: Mapping[str, Mapping[int, Scores]] = field(default_factory=dict)
    layers: Scores | None = None
    covariance: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    experts: Mapping[int, Seen] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """For scores.safetensors: `hidden_size`, `layers`, `num_attention_heads.3`, `intermediate_size.3`."""
        tensors: dict[str, torch.Tensor] = {}
        if self.hidden is not None:
            tensors[HIDDEN] = torch.from_numpy(self.hidden)
        if self.layers is not None:
            tensors[LAYERS] = torch.from_numpy(self.layers)
        for key, matrix in self.covariance.items():
            tensors[f"{COVARIANCE}.{key}"] = torch.from_numpy(matrix)
        for layer, score in self.heads.items():
            tensors[f"{HEADS}.{layer}"] = torch.from_numpy(score)
        for name, layers in self.widths.items():
            for layer, score in layers.items():
                tensors[f"{name}.{layer}"] = torch.from_numpy(score)
        for number, seen in self.experts.items():
            tensors[f"{EXPERT_TOKENS}.{number}"] = torch.from_numpy(seen.tokens)
            tensors[f"{EXPERT_OUTPUTS}.{number}"] = torch.from_numpy(seen.outputs)
        return tensors

    @staticmethod
    def from_tensors(tensors: Mapping[str, torch.Tensor]) -> ScoreTable:
        hidden = layers = None
        heads: dict[int, Scores] = {}
        widths: dict[str, dict[int, Scores]] = {}
        covariance: dict[str, npt.NDArray[np.float64]] = {}
        experts: dict[int, Seen] = {}
        for key, tensor in tensors.items():
            name, _, layer = key.partition(".")
            if name == COVARIANCE:
                covariance[layer] = tensor.numpy().astype(np.float64)
                continue
            array = tensor.numpy().astype(np.float32)
            if name == EXPERT_TOKENS:
                experts[int(layer)] = Seen(array, tensors[f"{EXPERT_OUTPUTS}.{layer}"].numpy().astype(np.float32))
            elif name == EXPERT_OUTPUTS:
                continue
            elif name == HIDDEN:
                hidden = array
            elif name == LAYERS:
                layers = array
            elif name == HEADS:
                heads[int(layer)] = array
            else:
                widths.setdefault(name, {})[int(layer)] = array
        return ScoreTable(hidden, heads, widths, layers, covariance, experts)
