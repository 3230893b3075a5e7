"""Activations that the backward pass computes again instead of keeping them (Chen et al., arXiv 1604.06174): of whole decoder
layers, or of their attention alone (Korthikanti et al., arXiv 2205.05198, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from minitron.runtime.models import LanguageModel
from minitron.runtime.sharding import decoder_layers
from minitron.specs.attention_modules import attention_of
from minitron.specs.blocks.distill import Recomputation
from minitron.specs.errors import Problem, Refused


def recompute(model: LanguageModel, what: Recomputation) -> None:
    """Makes the backward pass compute activations of the model again: those of whole layers (True), of the attention in
    them, or none (False). Refused where a model's layers have no attention of their own.
    """
    if what is True:
        recompute_layers(model.module)
    elif what == "attention":
        found = [module for layer in decoder_layers(model) for module in attention_of(layer)]
        if not found:
            message = "no layer of this model has an attention module of its own"
            raise Refused([Problem("gradient_checkpointing", message, "write true or false")])
        for module in found:
            setattr(module, "forward", _recomputed(module.forward))  # noqa: B010 (a type checker forbids the plain way)


def recompute_layers(module: Any) -> None:
    """Makes the backward pass compute the activations of each layer again."""
    # The first name is that of transformers 5.23 and later.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **more)
        return checkpoint(forward, *args, use_reentrant=False, **more)

    return call
