"""Operators that take a whole axis together. What narrowing changes about them is noted, for `exact` and `approximate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minitron.compiler.rules.registry import Dims, Result, axis_index, rule

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

aten = torch.ops.aten


def reduced_axes(t: Tracer, node: torch.fx.Node, rank: int) -> set[int]:
    named = t.arg(node, 1)
    if named is None or named == []:
        return set(range(rank))
    return {axis_index(i, rank) for i in ([named] if isinstance(named, int) else named)}


def reduce(t: Tracer, node: torch.fx.Node, kind: str | None) -> Dims:
    """The dimensions left; `kind` is noted on those reduced, None where dropped zeros do not change the result."""
    dims = t.dims(node.args[0])
    axes = reduced_axes(t, node, len(dims))
    if kind is not None:
        for axis in axes:
            t.note(dims[axis], kind, node)
    keep = t.rank(node) == len(dims)
    return [() if i in axes else dim for i, dim in enumerate(dims) if keep or i not in axes]


@rule(aten.mean.dim, aten.mean.default)
def mean(t: Tracer, node: torch.fx.Node) -> Dims:
    return reduce(t, node, "mean")


@rule(aten.sum.dim_IntList, aten.sum.default)
def total(t: Tracer, node: torch.fx.Node) -> Dims:
    return reduce(t, node, None)


@rule(aten.var.correction, aten.std.correction, aten.amax.default, aten.amin.default, aten.any.dim, aten.all.dim)
def other_reduction(t: Tracer, node: torch.fx.Node) -> Dims:
    return reduce(t, node, str(node.target).split(".")[1])


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def vector_norm(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    axes = {axis_index(i, len(dims)) for i in t.arg(node, 2) or range(len(dims))}
    keep = t.rank(node) == len(dims)
    return [() if i in axes else dim for i, dim in enumerate(dims) if keep or i not in axes]


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int)
def softmax(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    axis = axis_index(t.integer(node, 1), len(dims))
    t.note(dims[axis], "softmax", node)
    t.softmaxes.append((node, axis))
    return dims


@rule(aten.layer_norm.default)
def layer_norm(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    width = len(t.arg(node, 1))
    for dim in dims[-width:]:
        t.note(dim, "layer_norm", node)
    affine = [t.dims(p) for p in (t.arg(node, 2), t.arg(node, 3)) if p is not None]
    return t.broadcast([dims, *affine], len(dims), t.place(node))


@rule(aten.rms_norm.default)
def rms_norm(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    for dim in dims[-len(t.arg(node, 1)) :]:
        t.note(dim, "rms_norm", node)
    weight = t.arg(node, 2)
    return t.broadcast([dims, *([t.dims(weight)] if weight is not None else [])], len(dims), t.place(node))


@rule(aten.cumsum.default, aten.cumprod.default, aten.diff.default, aten.flip.default, aten.roll.default)
def ordered(t: Tracer, node: torch.fx.Node) -> Dims:
    """The order along an axis matters: it cannot be permuted, so it is pinned."""
    dims = list(t.dims(node.args[0]))
    raw = t.arg(node, 2, -1) if node.target == aten.diff.default else t.arg(node, 1, 0)
    for axis in [raw] if isinstance(raw, int) else raw:
        index = axis_index(axis, len(dims))
        t.space.pin(dims[index], "its order matters", t.place(node))
        if t.sizes(node)[index].symbols:
            dims[index] = t.space.fresh(t.sizes(node)[index])
    return dims


@rule(aten.topk.default, aten.sort.default, aten.sort.stable)
def ranked(t: Tracer, node: torch.fx.Node) -> Result:
    """The indices that come out are positions along the axis; how many there are is no width of the model."""
    dims = t.dims(node.args[0])
    position = 2 if node.target == aten.topk.default else 1
    axis = axis_index(t.arg(node, position, -1), len(dims))
    t.note(dims[axis], "topk" if node.target == aten.topk.default else "sort", node)
    count = t.result_sizes(node)[0][axis]
    chosen = t.space.fresh(count)
    t.space.pin(chosen, "the number of entries that are ranked", t.place(node))
    return [[chosen if i == axis else dim for i, dim in enumerate(dims)] for _ in range(2)]


@rule(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim)
def extreme(t: Tracer, node: torch.fx.Node) -> Result:
    dims = t.dims(node.args[0])
    axes = reduced_axes(t, node, len(dims))
    for axis in axes:
        t.note(dims[axis], "max", node)
    sizes = t.result_sizes(node)
    left = [() if i in axes else d for i, d in enumerate(dims) if len(sizes[0]) == len(dims) or i not in axes]
    return left if t.is_single(node) else [left, left]
