"""Computes the likelihood of tokens under a model, in chunks, for held-out loss and perplexity."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron.runtime.loss.head import Head
from minitron.runtime.loss.products import project

_CHUNK_BYTES = 32 << 20


@torch.no_grad()
def negative_log_likelihood(hidden_TD: Tensor, head: Head, labels_T: Tensor) -> Tensor:
    """Sums over T tokens -log p(label) in nats, as an fp64 scalar; fp32 softmax, never [tokens x vocabulary]
    at once."""
    vocabulary = head.vocabulary
    chunk = max(1, min(hidden_TD.shape[0], _CHUNK_BYTES // (4 * vocabulary)))
    buffer_CV = torch.empty(chunk, vocabulary, device=hidden_TD.device)
    total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        for start in range(0, hidden_TD.shape[0], chunk):
            labels_C = labels_T[start : start + chunk]
            z_CV = buffer_CV[: labels_C.shape[0]]
            project(hidden_TD[start : start + chunk], head.weight_VD, z_CV)
            head.finish_(z_CV)
            picked_C = z_CV.gather(-1, labels_C.unsqueeze(-1)).squeeze(-1)
            total += (z_CV.logsumexp(-1) - picked_C).sum(dtype=torch.float64)
    return total
