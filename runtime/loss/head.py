"""The last step of a language model, from hidden states to logits, as plain tensors and numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """The head of a language model: `logits = softcap * tanh(z / softcap)` with `z = scale * (hidden @ weight.T +
    bias)`; no softcap: `logits = z`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        return self.weight_VD.shape[0]

    def in_dtype(self, dtype: torch.dtype) -> Head:
        """Returns the same head with its weight in `dtype` (no copy where it already is)."""
        return Head(self.weight_VD.to(dtype), self.bias_V, self.scale, self.softcap)

    def finish_(self, z_RV: Tensor, slope_RV: Tensor | None = None) -> None:
        """Turns `hidden @ weight.T` into logits in place, and writes d logits / d z_RV / scale to `slope_RV`."""
        if self.bias_V is not None:
            z_RV.add_(self.bias_V)
        if self.softcap is None:
            if self.scale != 1.0:
                z_RV.mul_(self.scale)
            return
        z_RV.mul_(self.scale / self.softcap).tanh_()
        if slope_RV is not None:
            torch.mul(z_RV, z_RV, out=slope_RV).neg_().add_(1.0)
        z_RV.mul_(self.softcap)
