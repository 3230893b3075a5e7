"""Second moments of activations, accumulated batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Gram:
    """The sum over tokens of x x^T, [C, C]: products in the values' float32, sums over batches in float64."""

    total: torch.Tensor | None = None
    tokens: int = 0

    def add(self, rows_NC: torch.Tensor) -> None:
        """Takes in the values of N tokens."""
        rows_NC = rows_NC.float()
        product = (rows_NC.T @ rows_NC).double()
        self.total = product if self.total is None else self.total.to(product.device).add_(product)
        self.tokens += rows_NC.shape[0]

    def mean(self) -> torch.Tensor:
        """The mean over tokens, [C, C] in float64."""
        assert self.total is not None, "no token was seen"
        return self.total / self.tokens
