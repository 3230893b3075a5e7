"""Operators that pick elements by computed positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minitron.compiler.rules.registry import Dims, axis_index, rule

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(t: Tracer, node: torch.fx.Node) -> Dims:
    """y[.., o] = W[ids[..], o]"""
    rows, width = t.dims(node.args[0])
    t.space.pin(rows, "indexed by token or position ids", t.place(node))
    return [*t.dims(node.args[1]), width]


@rule(aten.index.Tensor)
def index(t: Tracer, node: torch.fx.Node) -> Dims:
    """Adjacent index tensors are replaced where they stand, others come to the front, as NumPy does it."""
    dims = t.dims(node.args[0])
    indices = list(t.arg(node, 1))
    indices += [None] * (len(dims) - len(indices))
    used = [i for i, entry in enumerate(indices) if entry is not None]
    for axis in used:
        t.space.pin(dims[axis], "indexed by computed positions", t.place(node))
    operands = [t.dims(indices[i]) for i in used]
    picked = t.broadcast(operands, max((len(o) for o in operands), default=0), t.place(node))
    adjacent = not used or used == list(range(used[0], used[0] + len(used)))
    rest = [(i, dim) for i, dim in enumerate(dims) if i not in used]
    if not adjacent:
        return [*picked, *(dim for _, dim in rest)]
    first = used[0] if used else 0
    return [*(d for i, d in rest if i < first), *picked, *(d for i, d in rest if i >= first)]


@rule(aten.index_put.default, aten.index_put_.default)
def index_put(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    indices = t.arg(node, 1)
    for axis, entry in enumerate(indices):
        if entry is not None:
            t.space.pin(dims[axis], "indexed by computed positions", t.place(node))
    values = t.dims(t.arg(node, 2))
    rest = dims[len(indices) :]
    if rest and values:
        t.broadcast([rest, values[-len(rest) :]], len(rest), t.place(node))
    return dims


@rule(aten.index_select.default)
def index_select(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    axis = axis_index(t.integer(node, 1), len(dims))
    t.space.pin(dims[axis], "indexed by computed positions", t.place(node))
    dims[axis] = t.dims(t.arg(node, 2))[0]
    return dims


@rule(aten.gather.default)
def gather(t: Tracer, node: torch.fx.Node) -> Dims:
    dims, picked = t.dims(node.args[0]), list(t.dims(t.arg(node, 2)))
    axis = axis_index(t.integer(node, 1), len(dims))
    t.space.pin(dims[axis], "indexed by computed positions", t.place(node))
    for i, (dim, other) in enumerate(zip(dims, picked, strict=True)):
        if i != axis and dim and other:
            t.space.unify(dim, other, t.place(node))
    return picked


@rule(aten.one_hot.default, aten.histc.default, aten.bincount.default)
def counted(t: Tracer, node: torch.fx.Node) -> Dims:
    """Positions become an axis of their own."""
    kept = t.dims(node.args[0]) if node.target == aten.one_hot.default else []
    counts = t.space.fresh(t.sizes(node)[-1])
    t.space.pin(counts, "its indices are computed positions", t.place(node))
    return [*kept, counts]
