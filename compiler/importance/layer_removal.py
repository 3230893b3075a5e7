"""Ranks layers by the harm of removing each: the rise of the loss, or the error of the logits.

Each layer that is left out is a lane of one pass: what lies before it is computed once, for all lanes together, and
each weight is read once for all of them. The logits of one batch and of one lane are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from minitron.compiler.graph.executor import Executor, Fork
from minitron.compiler.importance.logit_harm import next_token_loss, squared_error
from minitron.compiler.importance.ranks import Ranks
from minitron.compiler.importance.scores import Scores
from minitron.compiler.roles.residual_stream import LayerEnds


@dataclass
class Removal:
    """The harm of dropping each layer alone, [layers] summed over the samples of `batches`."""

    executor: Executor
    ends: Sequence[LayerEnds]
    batches: Sequence[torch.Tensor]
    metric: Literal["loss", "logit_mse"]
    start: int = 0  # the first batch of the block that is run
    _harm: torch.Tensor = field(init=False)
    _layer_of: dict[int, int] = field(init=False)
    _whole: torch.Tensor | None = None
    _loss: float = 0.0

    def __post_init__(self) -> None:
        self._harm = torch.zeros(len(self.ends), dtype=torch.float64)
        self._layer_of = {self.executor.lane_of(fork): layer for layer, fork in enumerate(self.forks)}

    @property
    def forks(self) -> list[Fork]:
        """The layers, each left out in a lane of its own."""
        return [Fork(end.entry, end.leave) for end in self.ends]

    def measure(self, logits: torch.Tensor, number: int, lane: int) -> None:
        """Takes in the logits of one lane: first those of the whole model, then those of each that lacks a layer."""
        ids = self.batches[self.start + number]
        if lane == 0:
            self._whole = logits
            self._loss = next_token_loss(logits, ids) if self.metric == "loss" else 0.0
            return
        assert self._whole is not None
        loss = self.metric == "loss"
        value = next_token_loss(logits, ids) - self._loss if loss else squared_error(logits, self._whole)
        self._harm[self._layer_of[lane]] += value * ids.shape[0]

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors from which a killed calibration goes on."""
        return {"harm": self._harm}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up what an earlier process kept."""
        if "harm" in state:
            self._harm = state["harm"].clone()

    def scores(self, ranks: Ranks) -> Scores:
        """The mean over all samples, [layers]."""
        self._whole = None
        samples = ranks.sum(torch.tensor(sum(batch.shape[0] for batch in self.batches)))
        result: np.ndarray[tuple[int], np.dtype[np.float64]] = (ranks.sum(self._harm) / samples).numpy()
        return result.astype(np.float32)
