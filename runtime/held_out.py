"""Loss and perplexity on text that is not in the training data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minitron.runtime.data import Batch, Windows
from minitron.runtime.loss import negative_log_likelihood
from minitron.runtime.models import LanguageModel
from minitron.runtime.world import World
from minitron.specs.errors import WorkError


@dataclass(frozen=True)
class HeldOut:
    """The held-out figures: `loss` is the mean of -log p in nats over `tokens` predicted tokens, `perplexity` its
    exponential.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def held_out(
    model: LanguageModel, windows: Windows, world: World, *, batch_size: int, compute_dtype: torch.dtype = torch.float32
) -> HeldOut:
    """Predicts every token of the windows once, the ranks sharing the work; no [tokens x vocabulary] tensor exists at
    any time. WorkError where there is no token to predict.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    mine = range(world.rank, len(windows), world.size)
    most = -(-len(windows) // world.size)
    with evaluating(model), autocast(world.device, compute_dtype):
        for start in range(0, most, batch_size):
            indices = mine[start : start + batch_size]
            # Ranks whose weights are spread compute equally often: one that has no window left repeats the first.
            batch = windows.batch(indices or [0]).to(world.device)
            figures = model.gathered(partial(_figures, model, batch))
            if indices:
                sums += figures
    model.rest()
    loss, tokens = world.sum(sums).tolist()
    require_tokens(tokens)
    return HeldOut(loss / tokens, int(tokens))


def require_tokens(tokens: float) -> None:
    """Checks that held-out text has tokens to predict. WorkError where it has none."""
    if not tokens:
        raise WorkError("the held-out text has no token to predict; name more of it")


def _figures(model: LanguageModel, batch: Batch) -> Tensor:
    """Returns the sum of -log p and the number of its tokens, [2] in fp64."""
    hidden_TD = batch.pick(model.hidden_states(batch.input_ids_BL))
    sums = negative_log_likelihood(hidden_TD, model.head, batch.pick(batch.labels_BL))
    return torch.stack([sums, torch.full_like(sums, hidden_TD.shape[0])])


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Runs matrix products in `dtype`; in fp32 nothing is cast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Puts the model in eval mode, and at the end back into its previous mode."""
    training = model.module.training
    model.module.eval()
    try:
        yield
    finally:
        model.module.train(training)
