"""Weights that are moved by their last bit: what measures the noise of a function."""

from __future__ import annotations

import zlib

import torch

from minitron.compiler.graph.names import Fetch

_PIECE = 1 << 20  # elements that are moved at a time


def perturbed(fetch: Fetch) -> Fetch:
    """Gives every weight in float32, larger or smaller by one part in 2^23. Which of the two is the same in every run.

    The sign of an element is the product of signs of its indices, so that no second tensor of random numbers is made.
    """

    def get(name: str) -> torch.Tensor:
        weight = fetch(name)
        if not weight.is_floating_point():
            return weight
        moved = torch.empty(weight.shape, device=weight.device).copy_(weight)  # others may hold what was fetched
        del weight
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        factors = [torch.full((1,) * moved.dim(), torch.finfo(torch.float32).eps, device=moved.device)]
        for axis, size in enumerate(moved.shape):
            signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
            factors.append(signs.reshape([-1 if i == axis else 1 for i in range(moved.dim())]).to(moved.device))
        step = max(1, _PIECE * moved.shape[0] // max(1, moved.numel())) if moved.dim() else 1
        for start in range(0, moved.shape[0] if moved.dim() else 1, step):
            piece = moved[start : start + step] if moved.dim() else moved
            factor = factors[0]
            for axis, signs in enumerate(factors[1:]):
                factor = factor * (signs[start : start + step] if axis == 0 else signs)
            piece.add_(piece * factor)
        return moved

    return get
