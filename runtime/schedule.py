"""The schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from minitron.specs.blocks.training import Optimizer


def learning_rate(
    step: int, steps: int, optimizer: Optimizer, tokens: Callable[[int], int] = lambda steps: steps, held: int = 0
) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0, in a training of `steps`.

    Linear warm-up that reaches `lr` at the last of the warm-up steps, then half a cosine over the tokens down to exactly
    `min_lr` at the last step (Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts). `tokens` counts those
    of the first n steps; left out: all steps have as many. The rate stays at `lr` up to step `held`, as in the search that a
    training goes on from.
    """
    warmup = min(optimizer.warmup_steps, steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if step < held:
        return optimizer.lr
    before = tokens(max(warmup, held))
    done = (tokens(step + 1) - before) / (tokens(steps) - before)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
