"""The teacher with everything dropped set to zero, made equal to the student: the reference of the `masked` check.

Zeros are enough where an axis is only summed over. An operator that takes a whole axis together needs more:

    means       with dropped channels at zero, mean over all of x^2 = (kept / all) mean over the kept: the factor is undone
                here, in the reference only. (The student ships its norms as they are; see docs/architecture.md.) What a
                dropped query head yields is not zero, for its values are its group's: it is set to zero before the mean.
    norms       a layer norm, a variance and a standard deviation are computed over the kept channels: zeros would move the
                mean.
    reductions  dropped entries get the value that changes nothing: 0 in a sum, 1 in a product, infinity in a minimum
    choices     dropped entries get -infinity: a softmax or a maximum over all is then that over the kept ones
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Graph, GraphModule, Node

from minitron.compiler.axes.dims import Dims, size_of
from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.graph.aten import argument, axis_index, op_name
from minitron.compiler.graph.graph_module import rebuild

aten = torch.ops.aten

Packed = tuple[bytes, tuple[int, ...]]
"""Flags, eight to a byte, and their shape."""

# The number that changes nothing about a reduction.
NEUTRAL = {
    "sum": 0.0, "linalg_vector_norm": 0.0, "norm": 0.0, "prod": 1.0, "any": 0.0, "all": 1.0,
    "amin": math.inf, "min": math.inf, "argmin": math.inf,
    "softmax": -math.inf, "_softmax": -math.inf, "log_softmax": -math.inf, "logsumexp": -math.inf, "topk": -math.inf,
    "amax": -math.inf, "max": -math.inf, "argmax": -math.inf,
}  # fmt: skip
# Reductions that a zero, which zero weights yield, does not change.
SUMS = ("sum", "linalg_vector_norm", "norm")
MOMENTS = ("var", "std")
NORMS = ("layer_norm", "rms_norm")


class NoReference(ValueError):
    """Raised where the function of what is kept cannot be said of the teacher's graph, in words."""


def masked_reference(graph_module: GraphModule, table: AxisTable, narrowing: Narrowing) -> GraphModule:
    """The teacher's graph with its norms, means and choices over narrowed axes taken of what is left. NoReference where
    they cannot be."""
    reference = rebuild(graph_module)
    graph: Graph = reference.graph
    dims_of: dict[str, Any] = {node.name: dims for node, dims in table.nodes.items()}
    # Before anything is replaced: what an operator reads may be a norm that is not in the table afterwards.
    reads = {node: dims_of[node.args[0].name] for node in graph.nodes if _takes_an_axis(node)}
    for node, dims in reads.items():
        name = op_name(node)
        if name == "mean":
            _scale_mean(graph, node, dims, narrowing)
        elif name in NEUTRAL:
            for axis in _axes(node, len(dims)):
                if narrowing.touches(dims[axis]):
                    with suppress(NoReference) if name in SUMS else nullcontext():
                        _fill(graph, node, gone(dims, axis, narrowing), NEUTRAL[name])
        elif name in MOMENTS:
            _replace(graph, node, _axes(node, len(dims)), dims, narrowing)
        elif name in NORMS:
            width = len(argument(node, 1))
            _replace(graph, node, list(range(len(dims) - width, len(dims))), dims, narrowing)
    reference.recompile()
    return reference


def _takes_an_axis(node: Node) -> bool:
    known = isinstance(node.target, torch._ops.OpOverload) and op_name(node) in ("mean", *NEUTRAL, *MOMENTS, *NORMS)
    return known and bool(node.args) and isinstance(node.args[0], Node)


def _axes(node: Node, rank: int) -> list[int]:
    """The axes that a reduction takes together; all of them where it names none."""
    named: Any = argument(node, "dim", -1 if op_name(node) == "topk" else None)
    if named is None or named == []:
        return list(range(rank))
    return [axis_index(axis, rank) for axis in ([named] if isinstance(named, int) else named)]


def _scale_mean(graph: Graph, node: Node, dims: Dims, narrowing: Narrowing) -> None:
    factor = 1.0
    for axis in _axes(node, len(dims)):
        if narrowing.touches(dims[axis]):
            _fill(graph, node, gone(dims, axis, narrowing), 0.0)
            factor *= size_of(dims[axis]).coefficient / narrowing.count(dims[axis])
    if factor != 1.0:
        with graph.inserting_after(node):
            scaled = graph.call_function(aten.mul.Tensor, (node, factor))
        scaled.meta = dict(node.meta)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _fill(graph: Graph, node: Node, flags: npt.NDArray[np.bool_], number: float) -> None:
    """Puts `number` where `flags` are set into the value that `node` reads."""
    value = node.args[0]
    assert isinstance(value, Node)
    with graph.inserting_before(node):
        masked = graph.call_function(fill, (value, _packed(flags), number))
    masked.meta = dict(value.meta)
    node.args = (masked, *node.args[1:])


def _replace(graph: Graph, node: Node, axes: Sequence[int], dims: Dims, narrowing: Narrowing) -> None:
    """Puts the same function of what is kept along `axes` in the place of a norm or of a moment."""
    flags = np.zeros((1,) * len(dims), dtype=bool)
    for axis in axes:
        if narrowing.touches(dims[axis]):
            flags = flags | gone(dims, axis, narrowing)
    if not flags.any():
        return
    name, value = op_name(node), node.args[0]
    arguments: tuple[Any, ...]
    if name in MOMENTS:
        arguments = (value, _packed(flags), tuple(axes), float(argument(node, "correction", 1)))
        arguments = (*arguments, bool(argument(node, "keepdim", False)), name == "std")
        function: Any = moment
    else:
        weight, eps = argument(node, "weight"), argument(node, "eps", 1e-5 if name == "layer_norm" else None)
        bias = argument(node, "bias") if name == "layer_norm" else None
        function, arguments = normalise, (value, _packed(flags), len(axes), weight, bias, eps, name == "layer_norm")
    with graph.inserting_before(node):
        replaced = graph.call_function(function, arguments)
    replaced.meta = dict(node.meta)
    node.replace_all_uses_with(replaced)
    graph.erase_node(node)


def gone(dims: Dims, axis: int, narrowing: Narrowing) -> npt.NDArray[np.bool_]:
    """Flags the entries of a value of these dimensions that are dropped along `axis`, in a shape that broadcasts to it."""
    shape = [1] * len(dims)
    shape[axis] = size_of(dims[axis]).coefficient
    owners = narrowing.elsewhere(dims[axis])
    if not owners:
        flags = np.ones(shape[axis], dtype=bool)
        flags[narrowing.positions(dims[axis])] = False
        return flags.reshape(shape)
    beside = next((i for i, dim in enumerate(dims) if set(owners) <= set(narrowing.space.leaves(dim))), None)
    if beside is None:
        raise NoReference("what is kept differs with an index that the value reduced does not have")
    shape[beside] = size_of(dims[beside]).coefficient
    flags = np.ones((shape[beside], shape[axis]), dtype=bool)
    kept = narrowing.positions_beside(dims[axis], dims[beside])
    flags[narrowing.positions(dims[beside])[:, None], kept] = False
    return (flags if beside < axis else flags.T).reshape(shape)


def _packed(flags: npt.NDArray[np.bool_]) -> Packed:
    """Flags as an argument of a node: eight to a byte, because a list is walked through each time the node is run."""
    return np.packbits(flags).tobytes(), flags.shape


def _unpacked(gone: Packed, value: torch.Tensor) -> torch.Tensor:
    packed, shape = gone
    flags = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=int(np.prod(shape))).astype(bool).reshape(shape)
    return torch.from_numpy(flags).to(value.device)


def fill(value: torch.Tensor, gone: Packed, number: float) -> torch.Tensor:
    """`value` with `number` wherever `gone` says so: flags of a shape that broadcasts to it."""
    own: float | int | bool = number
    if value.dtype == torch.bool:
        own = bool(number)
    elif not value.is_floating_point():
        limits = torch.iinfo(value.dtype)
        own = int(min(max(number, limits.min), limits.max))
    return value.masked_fill(_unpacked(gone, value), own)


def moment(
    value: torch.Tensor,
    gone: Packed,
    axes: Sequence[int],
    correction: float,
    keep: bool,
    root: bool,
) -> torch.Tensor:
    """The variance over `axes` of what is not `gone`, or its `root`."""
    stays = (~_unpacked(gone, value)).to(value.dtype)
    count = stays.expand(value.shape).sum(list(axes), keepdim=True)
    mean = (value * stays).sum(list(axes), keepdim=True) / count
    squares = ((value - mean) * stays).square().sum(list(axes), keepdim=True)
    found = squares / (count - correction)
    found = found.sqrt() if root else found
    return found if keep else found.squeeze(tuple(axes))


def normalise(
    value: torch.Tensor, gone: Packed, width: int, weight: torch.Tensor | None,
    bias: torch.Tensor | None, eps: float | None, centred: bool,
) -> torch.Tensor:  # fmt: skip
    """A norm over the last `width` axes of what is not `gone`, and zeros where it is; without `centred` no mean is taken
    off."""
    axes = list(range(-width, 0))
    stays = (~_unpacked(gone, value)).to(value.dtype)
    count = stays.expand(value.shape).sum(axes, keepdim=True)
    if centred:
        value = value - (value * stays).sum(axes, keepdim=True) / count
    value = value * stays
    power = value.square().sum(axes, keepdim=True) / count
    result = value * torch.rsqrt(power + (torch.finfo(value.dtype).eps if eps is None else eps))
    if weight is not None:
        result = result * weight
    return result * stays if bias is None else (result + bias) * stays
