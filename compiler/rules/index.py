"""Operators that pick elements by computed positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from minitron.compiler.dims import Dim, size_of
from minitron.compiler.rules.registry import Dims, Result, axis_index, rule

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(t: Tracer, node: torch.fx.Node) -> Dims:
    """y[.., o] = W[ids[..], o]"""
    rows, width = t.dims(node.args[0])
    t.space.pin(rows, "indexed by token or position ids", t.place(node))
    return [*t.dims(node.args[1]), width]


def masks(indices: Sequence[Any]) -> bool:
    """Whether a tensor of truth values stands among indices: it takes as many dimensions as it has, for one."""
    found = [entry.meta["val"].dtype for entry in indices if entry is not None]
    return torch.bool in found or torch.uint8 in found


def indexed(t: Tracer, node: torch.fx.Node, indices: list[Any]) -> Dims:
    """The dimensions of `x[indices]`, where x is the first operand.

    Adjacent index tensors are replaced where they stand, others come to the front, as NumPy does it.
    """
    dims = t.dims(node.args[0])
    indices = indices + [None] * (len(dims) - len(indices))
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


@rule(aten.index.Tensor)
def index(t: Tracer, node: torch.fx.Node) -> Result:
    indices = list(t.arg(node, 1))
    return t.opaque(node) if masks(indices) else indexed(t, node, indices)


@rule(aten.index_put.default, aten.index_put_.default)
def index_put(t: Tracer, node: torch.fx.Node) -> Result:
    """x[indices] = values: the values broadcast to what indexing would have read."""
    indices = list(t.arg(node, 1))
    if masks(indices):
        return t.opaque(node)
    place = indexed(t, node, indices)
    t.broadcast([place, t.dims(t.arg(node, 2))], len(place), t.place(node))
    return t.dims(node.args[0])


@rule(aten.index_select.default)
def index_select(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    axis = axis_index(t.integer(node, 1), len(dims))
    t.space.pin(dims[axis], "indexed by computed positions", t.place(node))
    picked = t.dims(t.arg(node, 2))
    dims[axis] = picked[0] if picked else ()
    return dims


@rule(aten.index_add.default, aten.index_add_.default, aten.index_copy.default, aten.index_copy_.default)
def index_add(t: Tracer, node: torch.fx.Node) -> Dims:
    """Rows of a source go to, or are added at, computed positions of an axis."""
    dims, source = t.dims(node.args[0]), list(t.dims(t.arg(node, 3)))
    axis = axis_index(t.integer(node, 1), len(dims))
    t.space.pin(dims[axis], "indexed by computed positions", t.place(node))
    t.broadcast([t.dims(t.arg(node, 2)), [source[axis]]], 1, t.place(node))
    source[axis] = ()
    t.broadcast([dims, source], len(dims), t.place(node))
    return dims


@rule(aten.gather.default)
def gather(t: Tracer, node: torch.fx.Node) -> Dims:
    """y[.., j, ..] = x[.., index[.., j, ..], ..]: every other axis is walked from its first index on."""
    picked = t.dims(t.arg(node, 2))
    aligned(t, node, t.dims(node.args[0]), picked)
    return picked


@rule(aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce, aten.scatter_reduce_)
def scatter(t: Tracer, node: torch.fx.Node) -> Dims:
    """x[.., index[.., j, ..], ..] = y[.., j, ..], where y may be longer than the index."""
    dims, picked = t.dims(node.args[0]), t.dims(t.arg(node, 2))
    aligned(t, node, dims, picked)
    source = t.dims(t.arg(node, 3))
    for a, b in zip(source, picked, strict=False):
        walked_together(t, node, a, b)
    return dims


def aligned(t: Tracer, node: torch.fx.Node, dims: Dims, picked: Dims) -> None:
    """The axis that is indexed is pinned, along all others positions and values are walked together."""
    axis = axis_index(t.integer(node, 1), len(dims))
    t.space.pin(dims[axis], "indexed by computed positions", t.place(node))
    for i, (dim, other) in enumerate(zip(dims, picked, strict=True)):
        if i != axis:
            walked_together(t, node, dim, other)


def walked_together(t: Tracer, node: torch.fx.Node, dim: Dim, other: Dim) -> None:
    if size_of(dim) == size_of(other):
        t.space.unify(dim, other, t.place(node))
        return
    for one in (dim, other):
        t.space.pin(one, "only its first indices are taken", t.place(node))


@rule(aten.one_hot.default, aten.histc.default, aten.bincount.default)
def counted(t: Tracer, node: torch.fx.Node) -> Dims:
    """Positions become an axis of their own."""
    kept = t.dims(node.args[0]) if node.target == aten.one_hot.default else []
    counts = t.space.fresh(t.sizes(node)[-1])
    t.space.pin(counts, "its indices are computed positions", t.place(node))
    return [*kept, counts]
