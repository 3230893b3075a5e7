"""The harm that a change of the teacher does to its logits: by the loss on the text, or by the distance from its own."""

from __future__ import annotations

import torch


def next_token_loss(logits_BSV: torch.Tensor, ids_BS: torch.Tensor) -> float:
    """The mean cross-entropy with the next token, in nats."""
    flat = logits_BSV[:, :-1].reshape(-1, logits_BSV.shape[-1]).float()
    return float(torch.nn.functional.cross_entropy(flat, ids_BS[:, 1:].reshape(-1).to(flat.device)))


def squared_error(logits: torch.Tensor, whole: torch.Tensor) -> float:
    """The mean squared difference from the logits of the whole model."""
    return float((logits.float() - whole.float()).square().mean())
