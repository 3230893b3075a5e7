"""Operators that pick elements by computed positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from minitron.compiler.axes.dims import Dim, Dims, Result, Size, size_of
from minitron.compiler.axes.index_meaning import Counts, Positions
from minitron.compiler.axes.rules.registry import rule
from minitron.compiler.axes.tracer import Tracer
from minitron.compiler.graph.aten import axis_index

aten = torch.ops.aten
COMPUTED = "indexed by computed positions"


def addressed(t: Tracer, node: torch.fx.Node, dim: Dim, index: Any, reason: str = COMPUTED) -> None:
    """Unifies `dim`, read or written at the positions in `index`, with the axis of those positions; pins `dim` where
    none."""
    positions = t.positions(index)
    if positions is not None and size_of(positions.of) == size_of(dim):
        t.space.unify(dim, positions.of, t.place(node))
        return
    t.space.pin(dim, reason, t.place(node))
    if positions is not None:
        t.pin_as_values(positions, t.place(node))


def values_picked(t: Tracer, node: torch.fx.Node) -> None:
    """Carries the meaning over: positions that are picked out of others are positions too."""
    picked = t.positions(node.args[0])
    if picked is not None:
        t.set_meaning(node, replace(picked, source=node))


@rule(aten.embedding.default, positions="own")
def embedding(t: Tracer, node: torch.fx.Node) -> Dims:
    """y[.., o] = W[ids[..], o]"""
    rows, width = t.dims(node.args[0])
    addressed(t, node, rows, node.args[1], "indexed by token or position ids")
    return [*t.dims(node.args[1]), width]


def masks(indices: Sequence[Any]) -> bool:
    """Checks whether a boolean mask is among the indices: a mask replaces as many dimensions as it has by one."""
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
        addressed(t, node, dims[axis], indices[axis])
    operands = [t.dims(indices[i]) for i in used]
    picked = t.broadcast(operands, max((len(o) for o in operands), default=0), t.place(node))
    adjacent = not used or used == list(range(used[0], used[0] + len(used)))
    rest = [(i, dim) for i, dim in enumerate(dims) if i not in used]
    if not adjacent:
        return [*picked, *(dim for _, dim in rest)]
    first = used[0] if used else 0
    return [*(d for i, d in rest if i < first), *picked, *(d for i, d in rest if i >= first)]


@rule(aten.index.Tensor, positions="own")
def index(t: Tracer, node: torch.fx.Node) -> Result:
    indices = list(t.arg(node, 1))
    if masks(indices):
        return t.opaque(node)
    values_picked(t, node)
    return indexed(t, node, indices)


@rule(aten.index_put.default, aten.index_put_.default, positions="own")
def index_put(t: Tracer, node: torch.fx.Node) -> Result:
    """x[indices] = values: the values broadcast to what indexing would have read."""
    indices, values = list(t.arg(node, 1)), t.arg(node, 2)
    if masks(indices):
        return t.opaque(node)
    place = indexed(t, node, indices)
    t.broadcast([place, t.dims(values)], len(place), t.place(node))
    written = t.positions(values)
    if t.positions(node.args[0]) is not None or (written is not None and not is_blank(node.args[0])):
        t.pin_operands_as_values(node)
    elif written is not None:
        t.set_meaning(node, replace(written, source=node))
    return t.dims(node.args[0])


def is_blank(node: Any) -> bool:
    """Checks whether a tensor is uninitialised and read by one node only."""
    empty = (aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default)
    return isinstance(node, torch.fx.Node) and node.target in empty and len(node.users) == 1


@rule(aten.index_select.default, positions="own")
def index_select(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    axis = axis_index(t.integer(node, 1), len(dims))
    addressed(t, node, dims[axis], t.arg(node, 2))
    values_picked(t, node)
    picked = t.dims(t.arg(node, 2))
    dims[axis] = picked[0] if picked else ()
    return dims


@rule(
    aten.index_add.default, aten.index_add_.default, aten.index_copy.default, aten.index_copy_.default,
    positions="own",
)  # fmt: skip
def index_add(t: Tracer, node: torch.fx.Node) -> Dims:
    """Writes or adds the rows of a source at computed positions of an axis."""
    dims, source = t.dims(node.args[0]), list(t.dims(t.arg(node, 3)))
    axis = axis_index(t.integer(node, 1), len(dims))
    for written in (node.args[0], t.arg(node, 3)):
        t.pin_as_values(t.positions(written), t.place(node))
    addressed(t, node, dims[axis], t.arg(node, 2))
    t.broadcast([t.dims(t.arg(node, 2)), [source[axis]]], 1, t.place(node))
    source[axis] = ()
    t.broadcast([dims, source], len(dims), t.place(node))
    return dims


@rule(aten.gather.default, positions="own")
def gather(t: Tracer, node: torch.fx.Node) -> Dims:
    """y[.., j, ..] = x[.., index[.., j, ..], ..]: every other axis is walked from its first index on."""
    picked = t.dims(t.arg(node, 2))
    aligned(t, node, t.dims(node.args[0]), picked)
    values_picked(t, node)
    return picked


@rule(
    aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce, aten.scatter_reduce_,
    positions="own",
)  # fmt: skip
def scatter(t: Tracer, node: torch.fx.Node) -> Dims:
    """x[.., index[.., j, ..], ..] = y[.., j, ..], where y may be longer than the index."""
    dims, picked = t.dims(node.args[0]), t.dims(t.arg(node, 2))
    aligned(t, node, dims, picked)
    for written in (node.args[0], t.arg(node, 3)):
        t.pin_as_values(t.positions(written), t.place(node))
    source = t.dims(t.arg(node, 3))
    for a, b in zip(source, picked, strict=False):
        walked_together(t, node, a, b)
    return dims


def aligned(t: Tracer, node: torch.fx.Node, dims: Dims, picked: Dims) -> None:
    """Unifies the dimensions of positions and values along every axis but the indexed one."""
    axis = axis_index(t.integer(node, 1), len(dims))
    addressed(t, node, dims[axis] if dims else (), t.arg(node, 2))
    for i, (dim, other) in enumerate(zip(dims, picked, strict=True)):
        if i != axis:
            walked_together(t, node, dim, other)


def walked_together(t: Tracer, node: torch.fx.Node, dim: Dim, other: Dim) -> None:
    if size_of(dim) == size_of(other):
        t.space.unify(dim, other, t.place(node))
        return
    for one in (dim, other):
        t.space.pin(one, "only its first indices are taken", t.place(node))


@rule(aten.one_hot.default, positions="own")
def one_hot(t: Tracer, node: torch.fx.Node) -> Dims:
    """Turns positions into an axis: the axis of those positions, where the number of classes is its size."""
    positions, classes = t.positions(node.args[0]), t.sizes(node)[-1]
    axis = classes_of(t, node, positions, classes if positions and size_of(positions.of) == classes else None)
    return [*t.dims(node.args[0]), axis]


@rule(aten.histc.default, positions="own")
def histc(t: Tracer, node: torch.fx.Node) -> Dims:
    """Counts how often each position occurs, where each position has its own bin."""
    positions, bins = t.positions(node.args[0]), t.sizes(node)[0]
    whole = t.arg(node, "min", 0) == 0 and t.arg(node, "max", 0) == bins.coefficient - 1
    axis = classes_of(t, node, positions, bins if whole else None)
    if positions is not None and axis == positions.of:
        t.set_meaning(node, Counts(positions.of, positions.source))
    return [axis]


@rule(aten.bincount.default)
def bincount(t: Tracer, node: torch.fx.Node) -> Dims:
    """Returns one new axis: its number of counts depends on the largest value."""
    return [classes_of(t, node, None, None)]


def classes_of(t: Tracer, node: torch.fx.Node, positions: Positions | None, classes: Size | None) -> Dim:
    if positions is not None and classes == size_of(positions.of):
        return positions.of
    t.pin_as_values(positions, t.place(node))
    axis = t.space.fresh(t.sizes(node)[-1])
    t.space.pin(axis, "its indices are computed positions", t.place(node))
    return axis


@rule(aten.floor_divide.default, aten.floor_divide_.Tensor, positions="own")
def floor_divide(t: Tracer, node: torch.fx.Node) -> Dims:
    """Divides positions: a position along a product, divided by the size of the fast factor, is one along the slow
    factor."""
    positions, by = t.positions(node.args[0]), t.arg(node, 1)
    slow = size_of(positions.of).divided_by(Size(by)) if positions is not None and isinstance(by, int) else None
    if positions is not None and slow is not None and node.target == aten.floor_divide.default:
        rest, fast = t.space.reshape([positions.of], [slow, Size(by)], t.place(node))
        t.space.pin(fast, "what positions are divided by", t.place(node))
        t.set_meaning(node, replace(positions, of=rest, source=node))
    else:
        t.pin_operands_as_values(node)
    return t.broadcast([t.dims(operand) for operand in t.operands(node)], t.rank(node), t.place(node))
