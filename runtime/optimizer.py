"""The optimizer of the student's weights: AdamW, or Muon beside it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from minitron.runtime.muon import Muon
from minitron.runtime.narrow_adamw import NarrowAdamW
from minitron.specs.blocks.training import Optimizer


def make_optimizer(
    model: torch.nn.Module,
    settings: Optimizer,
    *,
    matrices: Collection[torch.nn.Parameter] = (),
    bf16_weights: bool = False,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Makes AdamW with weight decay for matrices and none for norms and biases: a parameter with one dimension sets a
    scale or an offset and has no reason to shrink (Loshchilov and Hutter, arXiv 1711.05101; the split is that of GPT-3,
    arXiv 2005.14165, appendix B). Weights in bf16, and moments in bf16, are rounded at random by `seed`.

    With `name: muon` the `matrices` (`layer_matrices`) are Muon's.
    """
    chosen = set(matrices) if settings.name == "muon" else set()
    # What is spread over ranks and what is whole on each (`sharding.py`) cannot be updated in one call.
    groups = [
        {
            "params": [
                parameter
                for parameter in model.parameters()
                if parameter.requires_grad
                and (parameter.ndim >= 2) == decays
                and isinstance(parameter, DTensor) == spread
                and (parameter in chosen) == orthogonal
            ],
            "weight_decay": settings.weight_decay if decays else 0.0,
            "orthogonal": orthogonal,
        }
        for orthogonal in (False, True)
        for spread in (True, False)
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    shared: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    narrow: dict[str, Any] = {"states": settings.states, "bf16_weights": bf16_weights, "seed": seed}
    if settings.name == "muon":
        return Muon(groups, momentum=settings.momentum, **narrow, **shared)
    if bf16_weights or settings.states != "float32":
        return NarrowAdamW(groups, **narrow, **shared)
    return torch.optim.AdamW(groups, fused=True, **shared)


def moments_like(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """Returns tensors of the size of the moments that the optimizer keeps of a parameter."""
    if isinstance(optimizer, NarrowAdamW):
        return list(optimizer.zeros(parameter).values())
    return [torch.empty_like(parameter, requires_grad=False) for _ in range(2)]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
