"""The teacher with everything dropped set to zero, made equal to the student: the reference of the `masked` check.

Zeros are enough where an axis is only summed over. An operator that takes a whole axis together needs more:

    means     with dropped channels at zero, mean over all of x^2 = (kept / all) mean over the kept: the factor is undone
              here, in the reference only. (The student ships its norms as they are; see docs/architecture.md.) What a
              dropped query head yields is no zero, for its values are its group's: it is made one before the mean.
    choices   a softmax or a largest value among all is that among the kept where the dropped have -infinity
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Graph, GraphModule, Node

from minitron.compiler.axes.dims import Dims, size_of
from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.graph.aten import axis_index
from minitron.compiler.graph.graph_module import rebuild

aten = torch.ops.aten


CHOOSING = {
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.topk.default, aten.max.dim, aten.max.default,
    aten.argmax.default, aten.amax.default, aten.logsumexp.default,
}  # fmt: skip


def masked_reference(graph_module: GraphModule, table: AxisTable, narrowing: Narrowing) -> GraphModule:
    """The teacher's graph with its means and choices over narrowed axes taken of what is left."""
    reference = rebuild(graph_module)
    graph: Graph = reference.graph
    dims_of: dict[str, Any] = {node.name: dims for node, dims in table.nodes.items()}
    for node in list(graph.nodes):
        if not node.args or not isinstance(node.args[0], Node):
            continue
        if getattr(node.target, "_opname", "") == "mean":
            _scale_mean(graph, node, dims_of[node.args[0].name], narrowing)
        elif node.target in CHOOSING:
            for axis in _axes(node, len(dims_of[node.args[0].name])):
                _mask(graph, node, dims_of[node.args[0].name], axis, narrowing, float("-inf"))
    reference.recompile()
    return reference


def _axes(node: Node, rank: int) -> list[int]:
    """The axes that a reduction takes together; all of them where it names none."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    default = -1 if node.target == aten.topk.default else None
    named: Any = default
    if "dim" in names:
        place = names.index("dim")
        named = node.args[place] if place < len(node.args) else node.kwargs.get("dim", default)
    if named is None or named == []:
        return list(range(rank))
    return [axis_index(axis, rank) for axis in ([named] if isinstance(named, int) else named)]


def _scale_mean(graph: Graph, node: Node, dims: Dims, narrowing: Narrowing) -> None:
    factor = 1.0
    for axis in _axes(node, len(dims)):
        if narrowing.touches(dims[axis]):
            _mask(graph, node, dims, axis, narrowing, 0.0)
            factor *= size_of(dims[axis]).coefficient / narrowing.count(dims[axis])
    if factor != 1.0:
        with graph.inserting_after(node):
            scaled = graph.call_function(aten.mul.Tensor, (node, factor))
        scaled.meta = dict(node.meta)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _mask(graph: Graph, node: Node, dims: Dims, axis: int, narrowing: Narrowing, number: float) -> None:
    """What `node` reads has `number` wherever something along `axis` is dropped."""
    if not narrowing.touches(dims[axis]):
        return
    value = node.args[0]
    assert isinstance(value, Node)
    flags = gone(dims, axis, narrowing)
    with graph.inserting_before(node):
        masked = graph.call_function(fill, (value, np.packbits(flags).tobytes(), flags.shape, number))
    masked.meta = dict(value.meta)
    node.args = (masked, *node.args[1:])


def gone(dims: Dims, axis: int, narrowing: Narrowing) -> npt.NDArray[np.bool_]:
    """Where a value of these dimensions holds what is dropped along `axis`, in a shape that broadcasts to it."""
    shape = [1] * len(dims)
    shape[axis] = size_of(dims[axis]).coefficient
    owners = narrowing.elsewhere(dims[axis])
    if not owners:
        flags = np.ones(shape[axis], dtype=bool)
        flags[narrowing.positions(dims[axis])] = False
        return flags.reshape(shape)
    beside = next(i for i, dim in enumerate(dims) if set(owners) <= set(narrowing.space.leaves(dim)))
    shape[beside] = size_of(dims[beside]).coefficient
    flags = np.ones((shape[beside], shape[axis]), dtype=bool)
    kept = narrowing.positions_beside(dims[axis], dims[beside])
    flags[narrowing.positions(dims[beside])[:, None], kept] = False
    return (flags if beside < axis else flags.T).reshape(shape)


def fill(value: torch.Tensor, gone: bytes, shape: tuple[int, ...], number: float) -> torch.Tensor:
    """`value` with `number` wherever `gone` says so: flags packed eight to a byte, of a `shape` that broadcasts to it.

    Bytes, because an argument of a node that is a list is walked through each time the node is run.
    """
    flags = np.unpackbits(np.frombuffer(gone, dtype=np.uint8), count=int(np.prod(shape))).astype(bool).reshape(shape)
    return value.masked_fill(torch.from_numpy(flags).to(value.device), number)
