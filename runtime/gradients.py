"""The steps between backward and update: gradients are summed over the ranks, and their norm is clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from minitron.runtime.sharding import local
from minitron.runtime.world import World

_TINY = 1e-6  # keeps the quotient finite, as in torch.nn.utils.clip_grad_norm_


def sum_gradients(parameters: Sequence[torch.nn.Parameter], world: World) -> Tensor:
    """Sums the gradients over the ranks (those of sharded parameters are summed in backward already), and returns the
    norm of all of them together. The host does not wait for the norm.
    """
    _fill_up(parameters, world)
    whole, rows = _gradients(parameters)
    for gradient in whole:
        world.sum(gradient)
    norm = _norm(whole)
    if rows:
        # This rank's rows are part of a vector that the ranks hold together.
        squares = world.sum(_norm(rows).to(world.device, torch.float64).square())
        norm = (squares + norm.to(squares) ** 2).sqrt()
    return norm


def clip(parameters: Sequence[torch.nn.Parameter], norm: float, most: float | None) -> None:
    """Scales the gradients down to a norm of `most` where theirs is larger; with None never."""
    if most is None or (scale := most / (norm + _TINY)) >= 1.0:
        return
    for together in _gradients(parameters):  # which may be on different devices
        if together:
            torch._foreach_mul_(together, scale)


def _gradients(parameters: Sequence[torch.nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the gradients that are whole on this rank, and this rank's rows of the sharded ones."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    return whole, [local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]


def _fill_up(parameters: Sequence[torch.nn.Parameter], world: World) -> None:
    """Sets zeros where another rank has a gradient and this one has none: an expert may have received no token of this
    rank.
    """
    whole = [one for one in parameters if one.requires_grad and not isinstance(one, DTensor)]
    if world.size == 1 or not whole:
        return
    for parameter, somewhere in zip(whole, world.any_of(*(one.grad is not None for one in whole)), strict=True):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return get_total_norm(tensors) if tensors else torch.zeros(())
