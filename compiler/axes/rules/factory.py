"""Operators that make tensors out of nothing but sizes."""

from __future__ import annotations

import torch

from minitron.compiler.axes.dims import Dims
from minitron.compiler.axes.index_meaning import Positions
from minitron.compiler.axes.rules.registry import rule
from minitron.compiler.axes.tracer import Tracer

aten = torch.ops.aten
COUNTED = "counted off by arange"


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
    """Makes fresh dimensions: all elements are alike, so any number of them will do."""
    return [t.space.fresh(size) for size in t.sizes(node)]


@rule(aten.arange)
def arange(t: Tracer, node: torch.fx.Node) -> Dims:
    """0, 1, 2, ..: every index of a new axis is its own position along it. Other starts and steps are numbers."""
    dims = [t.space.fresh(size) for size in t.sizes(node)]
    integer = not node.meta["val"].dtype.is_floating_point
    if integer and t.arg(node, "start", 0) == 0 and t.arg(node, "step", 1) == 1:
        t.set_meaning(node, Positions(dims[0], node, COUNTED, t.place(node)))
    else:
        t.space.pin(dims[0], COUNTED, t.place(node))
    return dims
