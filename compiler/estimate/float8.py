"""The products of a model that float8 computes: how many weights they have, and what they need beside these for a moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minitron.specs.float8 import counts_of_experts, fits_float8

SCALE = 4  # bytes of a row's scale

ROUNDING = 8
"""Bytes of an element while it is rounded: in fp32, and scaled, where no kernel of torch.compile does both."""

EMULATED = 8
"""Bytes of an element of both operands where a CPU emulates a product: in fp32, and scaled back."""


@dataclass(frozen=True)
class Linears:
    """The linear layers of a model that float8 can compute: `weights` and `rows` count those of all of them, `largest` is the
    largest weight [rows, columns]; `all`: no other linear layer is inside of a decoder layer."""

    weights: int = 0
    rows: int = 0
    largest: tuple[int, int] = (0, 0)
    all: bool = False

    def held(self, parameters: int, element: int) -> int:
        """Returns the bytes of a model of `parameters`, of `element` bytes each but for these weights."""
        return (parameters - self.weights) * element + self.weights + self.rows * SCALE

    def beside(self, tokens: int, kind: str, *, training: bool, compiled: bool) -> int:
        """Returns the bytes that one product of the largest layer takes beside its operands and its result: both operands in
        float8, and what rounding them needs."""
        rows, columns = self.largest
        values, weight, results = tokens * columns, rows * columns, tokens * rows
        products = [(values, weight), (results, weight), (results, values)] if training else [(values, weight)]
        if kind != "cuda":
            return max((1 + EMULATED) * sum(product) for product in products)
        return max(sum(product) + (0 if compiled else ROUNDING * max(product)) for product in products)


NO_LINEARS = Linears()


def linears_of(model: torch.nn.Module, layer_path: str, config: Mapping[str, Any]) -> Linears:
    """Returns the linear layers that float8 can compute, as the runtime chooses them."""
    experts = counts_of_experts(config)
    found: list[tuple[int, int]] = []
    others = 0
    for layer in model.get_submodule(layer_path).children():
        for path, module in layer.named_modules():
            if type(module) is not torch.nn.Linear:
                continue
            rows, columns = module.weight.shape
            if fits_float8(path, rows, columns, experts):
                found.append((rows, columns))
            else:
                others += 1
    if not found:
        return NO_LINEARS
    return Linears(
        sum(rows * columns for rows, columns in found),
        sum(rows for rows, _ in found),
        max(found, key=lambda size: size[0] * size[1]),
        not others,
    )
