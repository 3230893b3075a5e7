"""AdamW over the student's fp32 master weights."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from minitron.specs.blocks.training import Optimizer


def make_optimizer(model: torch.nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Decay for matrices, none for norms and biases: what has one dimension sets a scale or an offset and has no reason
    to shrink (Loshchilov and Hutter, arXiv 1711.05101; the split is that of GPT-3, arXiv 2005.14165, appendix B)."""
    # What is spread over ranks and what is whole on each (`sharding.py`) cannot be updated in one call.
    groups = [
        {
            "params": [
                parameter
                for parameter in model.parameters()
                if parameter.requires_grad
                and (parameter.ndim >= 2) == decays
                and isinstance(parameter, DTensor) == spread
            ],
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for spread in (True, False)
        for decays in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
