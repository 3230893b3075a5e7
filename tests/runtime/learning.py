"""Optimizers at work on random gradients, for the tests of each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from minitron.runtime.checkpoint import Checkpoints, TrainerState, load
from minitron.runtime.pieces import model_pieces, optimizer_pieces
from minitron.runtime.world import World
from minitron.specs.progress import Silent

Fresh = Callable[[], tuple[torch.nn.Module, torch.optim.Optimizer]]


def learn(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Makes optimizer steps on gradients that follow from the step and the parameter."""
    for step in steps:
        for number, parameter in enumerate(module.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def resumes_to_the_byte(fresh: Fresh, folder: Path) -> None:
    """Checks that five steps give the same weights with a checkpoint, another process's model and optimizer, after three."""
    whole, optimizer = fresh()
    learn(whole, optimizer, range(5))
    first, optimizer = fresh()
    learn(first, optimizer, range(3))
    checkpoints = Checkpoints(folder, 1)
    pieces = {"model": model_pieces(first), "optimizer": optimizer_pieces(first, optimizer)}
    checkpoints.write_part(TrainerState(3, 3, 3), 0, 1, pieces)
    checkpoints.publish(TrainerState(3, 3, 3), 1, {}, None)
    second, optimizer = fresh()
    found = checkpoints.newest(Silent(), World(0, 1, torch.device("cpu")))
    assert found is not None
    load(found, second, optimizer)
    learn(second, optimizer, range(3, 5))
    for one, other in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
