"""Operators that take a whole axis together. What narrowing changes about them is noted, for `exact` and `approximate`."""

from __future__ import annotations

from typing import Any

import torch

from minitron.compiler.axes.dims import Dim, Dims, Result, size_of
from minitron.compiler.axes.index_meaning import AS_NUMBERS, Counts, Offsets, Positions, Sorted
from minitron.compiler.axes.rules.registry import rule
from minitron.compiler.axes.tracer import Tracer
from minitron.compiler.graph.aten import axis_index, op_name

aten = torch.ops.aten


def reduced_axes(t: Tracer, node: torch.fx.Node, rank: int) -> set[int]:
    named = t.arg(node, "dim")
    if named is None or named == []:
        return set(range(rank))
    return {axis_index(i, rank) for i in ([named] if isinstance(named, int) else named)}


def reduce(t: Tracer, node: torch.fx.Node, kind: str | None) -> Dims:
    """The dimensions left; `kind` is noted on those reduced, None where zeros in place of them would do the same."""
    dims = t.dims(node.args[0])
    axes = reduced_axes(t, node, len(dims))
    if kind is not None:
        for axis in axes:
            t.note(dims[axis], kind, node)
    keep = len(t.result_sizes(node)[0]) == len(dims)
    return [() if i in axes else dim for i, dim in enumerate(dims) if keep or i not in axes]


@rule(aten.mean.dim, aten.mean.default)
def mean(t: Tracer, node: torch.fx.Node) -> Dims:
    """Notes a mean: zeros change a mean by a factor only, as long as they still are zeros where the mean is taken."""
    (value,) = node.all_input_nodes
    rank = t.rank(value)
    off = any(adds_constant(t, value, axis - rank) for axis in reduced_axes(t, node, rank))
    return reduce(t, node, "variance" if off else "mean")


def adds_constant(t: Tracer, value: torch.fx.Node, axis: int) -> bool:
    """Checks whether a constant is added to every entry along `axis` on the way to `value`: zeros do not stay zero
    then.

    `axis` counts from the last, as broadcasting does.
    """
    while value.op == "call_function":
        name = op_name(value)
        if name in ("add", "sub", "rsub"):
            operands = [one for one in value.args[:2] if isinstance(one, torch.fx.Node)]
            return len(operands) < 2 or any(t.rank(one) < -axis or not t.dims(one)[axis] for one in operands)
        if name not in ("pow", "mul", "square", "abs", "to", "_to_copy") or len(value.all_input_nodes) != 1:
            return False
        value = value.all_input_nodes[0]
    return False


@rule(aten.sum.dim_IntList, aten.sum.default)
def total(t: Tracer, node: torch.fx.Node) -> Dims:
    """Sums an axis. A product with zero weights is zero and adds nothing: the outputs of all experts are summed this
    way."""
    dims = t.dims(node.args[0])
    axes = reduced_axes(t, node, len(dims))
    return reduce(t, node, None if all(vanishes(t, node.args[0], dims[axis]) for axis in axes) else "sum")


def vanishes(t: Tracer, value: Any, dim: Dim) -> bool:
    """Checks whether a value is zero along `dim` wherever its weights are zero: a product, possibly through views."""
    while op_name(value) in ("view", "reshape", "transpose", "permute", "to", "_unsafe_view"):
        value = value.args[0]
    if op_name(value) not in ("linear", "matmul", "bmm", "mm"):
        return False
    name = t.captured.parameter_behind(value.args[1])
    if name is None:
        return False
    weights = [atom for one in t.parameters[name] for atom in t.space.flat(one)]
    yielded = [atom for one in t.dims(value) for atom in t.space.flat(one)]
    return all(atom in weights and atom in yielded for atom in t.space.flat(dim))


@rule(
    aten.prod.dim_int, aten.prod.default, aten.logsumexp.default,
    aten.var.correction, aten.var.dim, aten.var.default, aten.std.correction, aten.std.dim, aten.std.default,
    aten.amax.default, aten.amin.default, aten.max.default, aten.min.default,
    aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims,
)  # fmt: skip
def other_reduction(t: Tracer, node: torch.fx.Node) -> Dims:
    return reduce(t, node, str(node.target).split(".")[1])


@rule(
    aten.var_mean.correction, aten.var_mean.dim, aten.var_mean.default,
    aten.std_mean.correction, aten.std_mean.dim, aten.std_mean.default,
)  # fmt: skip
def spread_and_mean(t: Tracer, node: torch.fx.Node) -> Result:
    left = reduce(t, node, str(node.target).split(".")[1].removesuffix("_mean"))
    return [left, left]


@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def vector_norm(t: Tracer, node: torch.fx.Node) -> Dims:
    """Reduces without a note where zeros add nothing: in a sum of positive powers, or in a maximum."""
    order = t.arg(node, 1, 2)
    return reduce(t, node, None if order is None or order > 0 else "norm")


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


@rule(aten.cumsum.default, positions="own")
def cumsum(t: Tracer, node: torch.fx.Node) -> Result:
    """Takes the running sum. For counts this gives the end of each index's rows, which `grouped_mm` looks for at its
    operand."""
    counts = t.meanings.get(node.args[0])
    if isinstance(counts, Counts) and t.rank(node) == 1:
        t.set_meaning(node, Offsets(counts.of, counts.source))
        return t.dims(node.args[0])
    t.pin_operands_as_values(node)
    return ordered(t, node)


@rule(aten.cumprod.default, aten.logcumsumexp.default, aten.flip.default, aten.roll.default)
def ordered(t: Tracer, node: torch.fx.Node) -> Result:
    """Pins the axis: its order matters, so the axis cannot be permuted."""
    dims = list(t.dims(node.args[0]))
    axes = t.arg(node, "dims" if node.target in (aten.flip.default, aten.roll.default) else "dim", [])
    if axes == []:  # `roll` over all elements, whatever axis they stand in
        return t.opaque(node)
    for axis in [axes] if isinstance(axes, int) else axes:
        index = axis_index(axis, len(dims))
        t.space.pin(dims[index], "its order matters", t.place(node))
        if t.sizes(node)[index].symbols:
            dims[index] = t.untracked(dims[index], t.sizes(node)[index], "its order matters", t.place(node))
    return dims


@rule(aten.diff.default)
def diff(t: Tracer, node: torch.fx.Node) -> Dims:
    """Every entry less the one before it; what is set before or after them is cut and pinned alike."""
    pieces = [t.dims(piece) for piece in (node.args[0], t.arg(node, 3), t.arg(node, 4)) if piece is not None]
    rank, place = t.rank(node), t.place(node)
    axis = axis_index(t.arg(node, 2, -1), rank)
    result = t.broadcast([[() if i == axis else dim for i, dim in enumerate(piece)] for piece in pieces], rank, place)
    result[axis] = t.space.fresh(t.sizes(node)[axis])
    for dim in (result[axis], *(piece[axis] for piece in pieces)):
        t.space.pin(dim, "its order matters", place)
    return result


@rule(aten.topk.default)
def topk(t: Tracer, node: torch.fx.Node) -> Result:
    """Returns the largest values and their positions; the number of values is not a width of the model."""
    dims = t.dims(node.args[0])
    axis = axis_index(t.arg(node, "dim", -1), len(dims))
    t.note(dims[axis], "topk", node)
    t.set_meaning(node, Positions(dims[axis], node), 1)
    return [_ranked(t, node, dims, axis)] * 2


@rule(aten.sort.default, aten.sort.stable, positions="own")
def sort(t: Tracer, node: torch.fx.Node) -> Result:
    """Returns the sorted values and their positions.

    Sorting a vector of positions along some axis groups the resulting rows by the indices of that axis.
    """
    dims = t.dims(node.args[0])
    axis = axis_index(t.arg(node, "dim", -1), len(dims))
    values = t.positions(node.args[0])
    rows = t.space.fresh(t.result_sizes(node)[0][axis]) if dims else ()
    if values is not None and len(dims) == 1 and rows and size_of(dims[0]).symbols:
        widths = tuple(atom for atom in t.space.flat(dims[0]) if atom.size.coefficient != 1)
        t.space.pin(widths, "its entries are put in their order", t.place(node))
        t.sorted.append(Sorted(rows[0], values.of, values.source, t.place(node)))
        t.set_meaning(node, values, 0)
        t.set_meaning(node, Positions(dims[0], node), 1)
        return [[rows], [rows]]
    t.pin_operands_as_values(node)
    t.space.pin(dims[axis] if dims else (), "its entries are put in their order", t.place(node))
    t.set_meaning(node, Positions(dims[axis] if dims else (), node), 1)
    return [_ranked(t, node, dims, axis)] * 2


def _ranked(t: Tracer, node: torch.fx.Node, dims: Dims, axis: int) -> Dims:
    chosen = t.space.fresh(t.result_sizes(node)[0][axis]) if dims else ()
    t.space.pin(chosen, "the number of entries that are ranked", t.place(node))
    return [chosen if i == axis else dim for i, dim in enumerate(dims)]


@rule(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim)
def extreme(t: Tracer, node: torch.fx.Node) -> Result:
    """The largest or smallest value, and the position that it had; without an axis, among all elements."""
    dims = t.dims(node.args[0])
    axes = reduced_axes(t, node, len(dims))
    single = t.is_single(node)
    if len(axes) == 1:
        (axis,) = axes
        t.set_meaning(node, Positions(dims[axis], node), None if single else 1)
    else:
        for axis in axes:
            t.space.pin(dims[axis], AS_NUMBERS, t.place(node))
    left = reduce(t, node, "max" if "max" in str(node.target) else "min")
    return left if single else [left, left]
