"""Weights that are moved by their last bit: what measures the noise of a function."""

from __future__ import annotations

import zlib

import torch

from minitron.compiler.graph.names import Fetch


def perturbed(fetch: Fetch) -> Fetch:
    """Gives every weight in float32, larger or smaller by one part in 2^23. Which of the two is the same in every run.

    The sign of an element is the product of signs of its indices, so that no second tensor of random numbers is made.
    """

    def moved(name: str) -> torch.Tensor:
        weight = fetch(name)
        if not weight.is_floating_point():
            return weight
        weight = weight.float()
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        factor = torch.full((1,) * weight.dim(), torch.finfo(torch.float32).eps)
        for axis, size in enumerate(weight.shape):
            signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
            factor = factor * signs.reshape([-1 if i == axis else 1 for i in range(weight.dim())])
        return weight + weight * factor.to(weight.device)

    return moved
