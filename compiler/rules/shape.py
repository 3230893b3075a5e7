"""Operators that move, split or join dimensions and leave every element as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minitron.compiler.dims import Dim, size_of
from minitron.compiler.rules.registry import Dims, Result, axis_index, rule

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

aten = torch.ops.aten


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten, aten.unflatten.int)
def view(t: Tracer, node: torch.fx.Node) -> Dims:
    return t.space.reshape(t.dims(node.args[0]), t.sizes(node), t.place(node))


@rule(aten.transpose.int)
def transpose(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    a, b = (axis_index(t.integer(node, i), len(dims)) for i in (1, 2))
    dims[a], dims[b] = dims[b], dims[a]
    return dims


@rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def swap_last(t: Tracer, node: torch.fx.Node) -> Dims:
    *front, a, b = t.dims(node.args[0])
    return [*front, b, a]


@rule(aten.permute.default)
def permute(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    order = t.arg(node, 1)
    return [dims[axis_index(i, len(dims))] for i in order]


@rule(aten.unsqueeze.default)
def unsqueeze(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    dims.insert(axis_index(t.integer(node, 1), len(dims) + 1), ())
    return dims


@rule(aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)
def squeeze(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    named = t.arg(node, 1, range(len(dims)))
    wanted = {axis_index(i, len(dims)) for i in ([named] if isinstance(named, int) else named)}
    return [dim for i, dim in enumerate(dims) if not (i in wanted and size_of(dim).is_one)]


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(t: Tracer, node: torch.fx.Node) -> Dims:
    """A dimension of one that grows is a *broadcast* axis: every index of it reads the same values."""
    sizes = t.sizes(node)
    dims = t.dims(node.args[0])
    dims = [()] * (len(sizes) - len(dims)) + dims
    return [
        dim if size_of(dim) == size else t.space.fresh(size, broadcast=True)
        for dim, size in zip(dims, sizes, strict=True)
    ]


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(t: Tracer, node: torch.fx.Node) -> Result:
    dims = list(t.dims(node.args[0]))
    along = t.arg(node, 2)
    if along is None:
        return t.opaque(node)
    axis = axis_index(along, len(dims))
    repeats = t.sizes(node)[axis].divided_by(size_of(dims[axis]))
    assert repeats is not None
    dims[axis] = (*dims[axis], *t.space.fresh(repeats, broadcast=True))
    return dims


@rule(aten.cat.default, aten.concat.default)
def cat(t: Tracer, node: torch.fx.Node) -> Dims:
    pieces = [t.dims(piece) for piece in t.arg(node, 0)]
    rank = len(pieces[0])
    axis = axis_index(t.arg(node, 1, 0), rank)
    place = t.place(node)
    result = t.broadcast([[() if i == axis else dim for i, dim in enumerate(piece)] for piece in pieces], rank, place)
    size = t.sizes(node)[axis]
    result[axis] = t.space.fresh(size) if size.symbols else t.space.cat([piece[axis] for piece in pieces])
    return result


@rule(aten.stack.default)
def stack(t: Tracer, node: torch.fx.Node) -> Dims:
    pieces = [t.dims(piece) for piece in t.arg(node, 0)]
    rank = len(pieces[0])
    result = t.broadcast(pieces, rank, t.place(node))
    new = t.space.fresh(t.sizes(node)[axis_index(t.arg(node, 1, 0), rank + 1)])
    t.space.pin(new, "a stack of separate values", t.place(node))
    result.insert(axis_index(t.arg(node, 1, 0), rank + 1), new)
    return result


@rule(aten.slice.Tensor)
def slice_(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    axis = axis_index(t.arg(node, 1, 0), len(dims))
    start, stop, step = t.arg(node, 2), t.arg(node, 3), t.arg(node, 4, 1)
    size, wanted = size_of(dims[axis]), t.sizes(node)[axis]
    if size == wanted and step == 1:
        return dims
    if size.symbols or wanted.symbols:
        dims[axis] = t.space.fresh(wanted)
    elif step != 1:
        dims[axis], _ = t.space.interleaved(dims[axis], step, t.place(node))
    else:
        begin = axis_bound(start, size.coefficient, 0)
        dims[axis] = t.space.slice(
            dims[axis], begin, axis_bound(stop, size.coefficient, size.coefficient), t.place(node)
        )
    return dims


def axis_bound(value: int | None, size: int, default: int) -> int:
    """A slice bound as Python reads it: negative from the end, too large cut off."""
    if value is None:
        return default
    return max(0, value + size) if value < 0 else min(value, size)


@rule(aten.narrow.default)
def narrow(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    axis, start, length = t.arg(node, 1), t.arg(node, 2), t.arg(node, 3)
    dims[axis] = t.space.slice(dims[axis], start, start + length, t.place(node))
    return dims


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default)
def split(t: Tracer, node: torch.fx.Node) -> list[Dims]:
    dims = t.dims(node.args[0])
    axis = axis_index(t.arg(node, 2, 0), len(dims))
    results: list[Dims] = []
    position = 0
    for sizes in t.result_sizes(node):
        piece: Dim
        if sizes[axis].symbols:
            piece = t.space.fresh(sizes[axis])
        else:
            piece = t.space.slice(dims[axis], position, position + sizes[axis].coefficient, t.place(node))
        position += sizes[axis].coefficient
        results.append([piece if i == axis else dim for i, dim in enumerate(dims)])
    return results


@rule(aten.unbind.int)
def unbind(t: Tracer, node: torch.fx.Node) -> list[Dims]:
    dims = t.dims(node.args[0])
    axis = axis_index(t.arg(node, 1, 0), len(dims))
    t.space.pin(dims[axis], "taken apart index by index", t.place(node))
    return [[dim for i, dim in enumerate(dims) if i != axis] for _ in t.result_sizes(node)]


@rule(aten.select.int)
def select(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    axis = axis_index(t.integer(node, 1), len(dims))
    t.space.pin(dims[axis], "one index of it is taken", t.place(node))
    return [dim for i, dim in enumerate(dims) if i != axis]


@rule(aten.tril.default, aten.triu.default)
def triangle(t: Tracer, node: torch.fx.Node) -> Dims:
    *front, a, b = t.dims(node.args[0])
    for dim in (a, b):
        t.space.pin(dim, "its position decides a triangular mask", t.place(node))
    return [*front, a, b]
