"""Operators that make tensors out of nothing but sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minitron.compiler.rules.registry import Dims, rule

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

aten = torch.ops.aten


@rule(
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.scalar_tensor.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
def uniform(t: Tracer, node: torch.fx.Node) -> Dims:
    """All elements are alike, so any number of them will do."""
    return [t.space.fresh(size) for size in t.sizes(node)]


@rule(aten.arange)
def arange(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = [t.space.fresh(size) for size in t.sizes(node)]
    t.space.pin(dims[0], "counted off by arange", t.place(node))
    return dims
