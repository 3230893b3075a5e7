"""Operators that move, split or join dimensions and leave every element as it is."""

from __future__ import annotations

from dataclasses import replace

import torch

from minitron.compiler.axes.dims import Dims, Result, size_of
from minitron.compiler.axes.rules.registry import rule
from minitron.compiler.axes.tracer import Tracer
from minitron.compiler.graph.aten import axis_index

aten = torch.ops.aten


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten,
    aten.unflatten.int,
    positions="same",
)
def view(t: Tracer, node: torch.fx.Node) -> Dims:
    return t.space.reshape(t.dims(node.args[0]), t.sizes(node), t.place(node))


@rule(aten.view_as.default, aten.reshape_as.default, positions="same")
def view_as(t: Tracer, node: torch.fx.Node) -> Dims:
    """Takes the sizes and axes of another value."""
    dims = t.space.reshape(t.dims(node.args[0]), t.sizes(node), t.place(node))
    return t.broadcast([dims, t.dims(node.args[1])], len(dims), t.place(node))


@rule(aten.view_as_real.default)
def view_as_real(t: Tracer, node: torch.fx.Node) -> Dims:
    pair = t.space.fresh(t.sizes(node)[-1])
    t.space.pin(pair, "real and imaginary part", t.place(node))
    return [*t.dims(node.args[0]), pair]


@rule(aten.view_as_complex.default)
def view_as_complex(t: Tracer, node: torch.fx.Node) -> Dims:
    *front, pair = t.dims(node.args[0])
    t.space.pin(pair, "real and imaginary part", t.place(node))
    return front


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, positions="same")
def transpose(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    a, b = (axis_index(t.integer(node, i), len(dims)) for i in (1, 2))
    dims[a], dims[b] = dims[b], dims[a]
    return dims


@rule(aten.mT.default, positions="same")
def swap_last(t: Tracer, node: torch.fx.Node) -> Dims:
    *front, a, b = t.dims(node.args[0])
    return [*front, b, a]


@rule(aten.t.default, aten.numpy_T.default, positions="same")
def turn(t: Tracer, node: torch.fx.Node) -> Dims:
    """All dimensions in the other order; `t` is for matrices and leaves a vector as it is."""
    return t.dims(node.args[0])[::-1]


@rule(aten.movedim.int, aten.movedim.intlist, positions="same")
def movedim(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    given = [[i] if isinstance(i, int) else i for i in (t.arg(node, 1), t.arg(node, 2))]
    source, target = ([axis_index(i, len(dims)) for i in axes] for axes in given)
    staying = iter([dim for i, dim in enumerate(dims) if i not in source])
    moved = {to: dims[i] for i, to in zip(source, target, strict=True)}
    return [moved[i] if i in moved else next(staying) for i in range(len(dims))]


@rule(aten.permute.default, positions="same")
def permute(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    order = t.arg(node, 1)
    return [dims[axis_index(i, len(dims))] for i in order]


@rule(aten.unsqueeze.default, positions="same")
def unsqueeze(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    dims.insert(axis_index(t.integer(node, 1), len(dims) + 1), ())
    return dims


@rule(aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, positions="same")
def squeeze(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = t.dims(node.args[0])
    named = t.arg(node, 1, range(len(dims)))
    wanted = {axis_index(i, len(dims)) for i in ([named] if isinstance(named, int) else named)}
    return [dim for i, dim in enumerate(dims) if not (i in wanted and size_of(dim).is_one)]


@rule(aten.expand.default, aten.broadcast_to.default, positions="some")
def expand(t: Tracer, node: torch.fx.Node) -> Dims:
    """Makes each expanded dimension of size one a *broadcast* axis: all its indices read the same values."""
    sizes = t.sizes(node)
    dims = t.dims(node.args[0])
    dims = [()] * (len(sizes) - len(dims)) + dims
    return [
        dim if size_of(dim) == size else t.space.fresh(size, broadcast=True)
        for dim, size in zip(dims, sizes, strict=True)
    ]


@rule(aten.expand_as.default, positions="some")
def expand_as(t: Tracer, node: torch.fx.Node) -> Dims:
    """Expands to the sizes of another value and follows the axes of that value."""
    return t.broadcast([t.dims(node.args[0]), t.dims(node.args[1])], t.rank(node), t.place(node))


@rule(aten.repeat.default, aten.tile.default, positions="some")
def repeat(t: Tracer, node: torch.fx.Node) -> Result:
    """Makes a dimension that is repeated a product whose slow factor is a *broadcast* axis."""
    sizes, dims = t.sizes(node), t.dims(node.args[0])
    dims = [()] * (len(sizes) - len(dims)) + dims
    repeats = [size.divided_by(size_of(dim)) for dim, size in zip(dims, sizes, strict=True)]
    if any(count is None for count in repeats):
        return t.opaque(node)
    return [
        (*t.space.fresh(count, broadcast=True), *dim)
        for dim, count in zip(dims, repeats, strict=True)
        if count is not None
    ]


@rule(aten.repeat_interleave.self_int, positions="some")
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


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default, positions="own")
def cat(t: Tracer, node: torch.fx.Node) -> Dims:
    """Pieces one after the other. (torch lets empty vectors stand among pieces of any rank.)"""
    rank, place = t.rank(node), t.place(node)
    _positions_of_one_axis(t, node)
    pieces = [dims for dims in (t.dims(piece) for piece in t.arg(node, 0)) if len(dims) == rank]
    axis = axis_index(t.arg(node, 1, 0), rank)
    result = t.broadcast([[() if i == axis else dim for i, dim in enumerate(piece)] for piece in pieces], rank, place)
    size = t.sizes(node)[axis]
    if not size.symbols:
        result[axis] = t.space.cat([piece[axis] for piece in pieces])
        return result
    reason = "joined with an axis of no fixed size"
    for piece in pieces:
        result[axis] = t.untracked(piece[axis], size, reason, place)
    return result


def _positions_of_one_axis(t: Tracer, node: torch.fx.Node) -> None:
    """Joined positions are positions, if they are so along one axis."""
    meanings = [t.positions(piece) for piece in t.arg(node, 0)]
    first = meanings[0]
    if first is None or any(other is None or size_of(other.of) != size_of(first.of) for other in meanings):
        t.pin_operands_as_values(node)
        return
    for other in meanings:
        assert other is not None
        t.space.unify(first.of, other.of, t.place(node))
    t.set_meaning(node, replace(first, source=node))


@rule(aten.stack.default)
def stack(t: Tracer, node: torch.fx.Node) -> Dims:
    pieces = [t.dims(piece) for piece in t.arg(node, 0)]
    rank = len(pieces[0])
    result = t.broadcast(pieces, rank, t.place(node))
    new = t.space.fresh(t.sizes(node)[axis_index(t.arg(node, 1, 0), rank + 1)])
    t.space.pin(new, "a stack of separate values", t.place(node))
    result.insert(axis_index(t.arg(node, 1, 0), rank + 1), new)
    return result


@rule(aten.slice.Tensor, positions="some")
def slice_(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    axis = axis_index(t.arg(node, 1, 0), len(dims))
    start, stop, step = t.arg(node, 2), t.arg(node, 3), t.arg(node, 4, 1)
    size, wanted = size_of(dims[axis]), t.sizes(node)[axis]
    if size == wanted and step == 1:
        return dims
    if size.symbols or not all(bound is None or isinstance(bound, int) for bound in (start, stop)):
        dims[axis] = t.untracked(dims[axis], wanted, "cut at a position that is not fixed", t.place(node))
        return dims
    begin = axis_bound(start, size.coefficient, 0)
    if step == 1:
        end = axis_bound(stop, size.coefficient, size.coefficient)
        dims[axis] = t.space.slice(dims[axis], begin, max(begin, end), t.place(node))
    elif wanted.coefficient * step == size.coefficient:
        dims[axis], _ = t.space.interleaved(dims[axis], step, t.place(node))
    else:
        dims[axis] = t.untracked(dims[axis], wanted, f"a slice with step {step} takes only a part of it", t.place(node))
    return dims


def axis_bound(value: int | None, size: int, default: int) -> int:
    """A slice bound as Python reads it: negative from the end, too large cut off."""
    if value is None:
        return default
    return max(0, value + size) if value < 0 else min(value, size)


@rule(aten.narrow.default, positions="some")
def narrow(t: Tracer, node: torch.fx.Node) -> Dims:
    dims = list(t.dims(node.args[0]))
    axis, start, length = axis_index(t.integer(node, 1), len(dims)), t.arg(node, 2), t.arg(node, 3)
    size, wanted = size_of(dims[axis]), t.sizes(node)[axis]
    if size.symbols or not (isinstance(start, int) and isinstance(length, int)):
        dims[axis] = t.untracked(dims[axis], wanted, "cut at a position that is not fixed", t.place(node))
    else:
        start = axis_bound(start, size.coefficient, 0)
        dims[axis] = t.space.slice(dims[axis], start, start + length, t.place(node))
    return dims


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, positions="some")
def split(t: Tracer, node: torch.fx.Node) -> list[Dims]:
    dims = t.dims(node.args[0])
    axis = axis_index(t.arg(node, 2, 0), len(dims))
    sizes = [result[axis] for result in t.result_sizes(node)]
    fixed = not any(size.symbols for size in (size_of(dims[axis]), *sizes))
    results: list[Dims] = []
    position = 0
    for size in sizes:
        if fixed:
            piece = t.space.slice(dims[axis], position, position + size.coefficient, t.place(node))
        else:
            piece = t.untracked(dims[axis], size, "cut at a position that is not fixed", t.place(node))
        position += size.coefficient
        results.append([piece if i == axis else dim for i, dim in enumerate(dims)])
    return results


@rule(aten.glu.default)
def glu(t: Tracer, node: torch.fx.Node) -> Dims:
    """y = a sigmoid(b), where a and b are the halves of an axis."""
    dims = list(t.dims(node.args[0]))
    axis = axis_index(t.arg(node, 1, -1), len(dims))
    half, whole = t.sizes(node)[axis], size_of(dims[axis])
    if whole.symbols:
        dims[axis] = t.untracked(dims[axis], half, "cut at a position that is not fixed", t.place(node))
        return dims
    first = t.space.slice(dims[axis], 0, half.coefficient, t.place(node))
    t.space.unify(first, t.space.slice(dims[axis], half.coefficient, whole.coefficient, t.place(node)), t.place(node))
    dims[axis] = first
    return dims


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(t: Tracer, node: torch.fx.Node) -> Dims:
    """Widths are named from the last dimension on, two for each: before and behind it."""
    dims, sizes = list(t.dims(node.args[0])), t.sizes(node)
    widths = t.arg(node, 1)
    for back in range(1, len(widths) // 2 + 1):
        if widths[2 * back - 2] != 0 or widths[2 * back - 1] != 0:
            dims[-back] = t.untracked(dims[-back], sizes[-back], "padded at its ends", t.place(node))
    return dims


@rule(aten.unbind.int)
def unbind(t: Tracer, node: torch.fx.Node) -> list[Dims]:
    dims = t.dims(node.args[0])
    axis = axis_index(t.arg(node, 1, 0), len(dims))
    t.space.pin(dims[axis], "taken apart index by index", t.place(node))
    return [[dim for i, dim in enumerate(dims) if i != axis] for _ in t.result_sizes(node)]


@rule(aten.select.int, positions="some")
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
