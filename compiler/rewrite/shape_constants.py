"""Pass: sizes and offsets that operators hold as constants follow the narrowed axes.

1. `view`, `expand` and the factories: every integer size becomes the size that is left of that dimension.
2. `slice`, `narrow`, `split` and `chunk`: every offset becomes the number of kept indices before it, so that each piece
   holds exactly what is left of the piece that it was.
3. Norms that name the shape that they normalise: the size that is left. `repeat` and `conv1d`: how often a dimension is
   written out, and how many groups of channels there are.
4. `squeeze`: only the dimensions that are of size one in the teacher.
5. `one_hot`, `histc` and `arange`: as many classes, bins and positions as are left.
6. -1 and symbolic sizes stay. A symbolic size that has a narrowed axis in it becomes -1.

Postcondition: run on the meta device, every value of the graph has the sizes that the analysis says are left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

from minitron.compiler.axes.dims import Dim, Dims, Result, size_of
from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.axes.rules.shape import axis_bound
from minitron.compiler.graph.aten import argument, axis_index
from minitron.compiler.graph.graph_module import fixed_length
from minitron.compiler.rewrite.passes import Pass
from minitron.specs.errors import UsageError

aten = torch.ops.aten

# Where the sizes of the result stand among the arguments.
SIZES_AT = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.broadcast_to.default: 1,
    aten.zeros.default: 0,
    aten.ones.default: 0,
    aten.full.default: 0,
    aten.empty.memory_format: 0,
    aten.new_zeros.default: 1,
    aten.new_ones.default: 1,
    aten.new_full.default: 1,
    aten.new_empty.default: 1,
}


class _Sizes:
    """The rewriting of one graph; `dims_of` is by node name."""

    def __init__(self, dims_of: Mapping[str, Result], narrowing: Narrowing) -> None:
        self.dims_of = dims_of
        self.narrowing = narrowing

    def dims(self, node: Any) -> Dims:
        return self.dims_of[node.name]  # type: ignore[return-value]

    def left(self, dim: Dim, old: Any) -> Any:
        """A size argument: integers become what is left, symbols stay unless something in them is narrowed."""
        if isinstance(old, int):
            return old if old == -1 else self.narrowing.count(dim)
        return -1 if self.narrowing.touches(dim) else old

    def offset(self, dim: Dim, old: int) -> int:
        """The number of kept indices before `old`."""
        return self.narrowing.before(dim, old)

    def rewrite(self, node: Node) -> bool:
        handler = HANDLERS.get(node.target)
        if handler is None or node.name not in self.dims_of:
            return False
        before = (node.args, dict(node.kwargs))
        handler(self, node)
        return before != (node.args, dict(node.kwargs))


def _sizes(s: _Sizes, node: Node) -> None:
    at = SIZES_AT[node.target]  # type: ignore[index]
    dims = s.dims(node)
    old = list(node.args[at])  # type: ignore[arg-type]
    new = [s.left(dim, size) for dim, size in zip(dims, old, strict=True)]
    if sum(1 for size in new if size == -1) > 1 and "expand" not in str(node.target):
        raise UsageError(f"{node.target} has two sizes that follow from narrowed axes and from the batch; refused")
    node.update_arg(at, new)


def _slice(s: _Sizes, node: Node) -> None:
    dims = s.dims(node.args[0])
    axis = axis_index(argument(node, 1, 0), len(dims))
    dim, step = dims[axis], argument(node, 4, 1)
    if step != 1 or not s.narrowing.touches(dim):
        return
    size = size_of(dim).coefficient
    start, stop = argument(node, 2, None), argument(node, 3, None)
    new_start = s.offset(dim, axis_bound(start, size, 0))
    new_stop = s.offset(dim, axis_bound(stop, size, size))
    node.args = (node.args[0], axis, new_start, new_stop)


def _narrow(s: _Sizes, node: Node) -> None:
    dims = s.dims(node.args[0])
    axis, start, length = (int(argument(node, i, 0)) for i in (1, 2, 3))
    begin = s.offset(dims[axis], start)
    node.args = (node.args[0], axis, begin, s.offset(dims[axis], start + length) - begin)


def _split(s: _Sizes, node: Node) -> None:
    """All of split, split_with_sizes and chunk become split_with_sizes where their pieces change."""
    dims = s.dims(node.args[0])
    axis = axis_index(argument(node, 2, 0), len(dims))
    if not s.narrowing.touches(dims[axis]):
        return
    pieces: list[Dims] = s.dims_of[node.name]  # type: ignore[assignment]
    node.target = aten.split_with_sizes.default
    node.args = (node.args[0], [s.narrowing.count(piece[axis]) for piece in pieces], axis)
    node.kwargs = {}


def _normalised_shape(s: _Sizes, node: Node) -> None:
    shape: list[int] = node.args[1]  # type: ignore[assignment]
    dims = s.dims(node.args[0])[-len(shape) :]
    node.update_arg(1, [s.narrowing.count(dim) for dim in dims])


def _unflatten(s: _Sizes, node: Node) -> None:
    axis, old = int(argument(node, 1, 0)), list(argument(node, 2, []))
    dims = s.dims(node)
    axis = axis_index(axis, len(dims) - len(old) + 1)
    node.update_arg(2, [s.left(dim, size) for dim, size in zip(dims[axis : axis + len(old)], old, strict=True)])


def _repeat_interleave(s: _Sizes, node: Node) -> None:
    axis = axis_index(argument(node, 2, 0), len(s.dims(node)))
    before, after = s.dims(node.args[0])[axis], s.dims(node)[axis]
    node.update_arg(1, s.narrowing.count(after) // s.narrowing.count(before))
    if isinstance(node.kwargs.get("output_size"), int):
        node.update_kwarg("output_size", s.narrowing.count(after))


def _repeat(s: _Sizes, node: Node) -> None:
    """Makes the repeat count of a dimension follow the narrowed axis that the repeats form."""
    before, after = s.dims(node.args[0]), s.dims(node)
    before = [()] * (len(after) - len(before)) + before
    old: list[Any] = list(argument(node, 1, []))
    old = [1] * (len(after) - len(old)) + old
    new = [
        s.narrowing.count(b) // s.narrowing.count(a) if isinstance(times, int) else times
        for a, b, times in zip(before, after, old, strict=True)
    ]
    node.update_arg(1, new)


def _squeeze(s: _Sizes, node: Node) -> None:
    """Squeezes the listed dimensions only where the teacher has size one there: a width that is narrowed to one
    stays."""
    dims = s.dims(node.args[0])
    named: Any = argument(node, "dim", range(len(dims)))
    wanted = {axis_index(axis, len(dims)) for axis in ([named] if isinstance(named, int) else named)}
    node.target = aten.squeeze.dims
    node.args = (node.args[0], [axis for axis, dim in enumerate(dims) if axis in wanted and size_of(dim).is_one])
    node.kwargs = {}


def _conv1d(s: _Sizes, node: Node) -> None:
    """Sets the groups where every channel is one of its own; groups of several channels are pinned by the analysis."""
    channels = s.dims(node.args[0])[-2]
    if argument(node, 6, 1) == size_of(channels).coefficient != 1:
        stride, padding, dilation = (argument(node, 3 + i, [default]) for i, default in enumerate((1, 0, 1)))
        groups = s.narrowing.count(channels)
        node.args = (*node.args[:2], argument(node, 2, None), stride, padding, dilation, groups)
        node.kwargs = {}


def _one_hot(s: _Sizes, node: Node) -> None:
    node.args = (node.args[0], s.narrowing.count(s.dims(node)[-1]))
    node.kwargs = {}


def _histc(s: _Sizes, node: Node) -> None:
    """Sets one bin for each position that is left."""
    if s.narrowing.touches(s.dims(node)[0]):
        bins = s.narrowing.count(s.dims(node)[0])
        node.args = (node.args[0], bins, 0, bins - 1)
        node.kwargs = {}


def _arange(s: _Sizes, node: Node) -> None:
    """Shortens a count from 0 in steps of 1 to the narrowed axis: the analysis lets no other be narrowed."""
    dim = s.dims(node)[0]
    if s.narrowing.touches(dim):
        node.target = aten.arange.default
        node.args = (s.narrowing.count(dim),)


HANDLERS: dict[Any, Callable[[_Sizes, Node], None]] = {
    **dict.fromkeys(SIZES_AT, _sizes),
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.split.Tensor: _split,
    aten.split.sizes: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.layer_norm.default: _normalised_shape,
    aten.rms_norm.default: _normalised_shape,
    aten.unflatten.int: _unflatten,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.repeat.default: _repeat,
    aten.tile.default: _repeat,
    aten.conv1d.default: _conv1d,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.one_hot.default: _one_hot,
    aten.histc.default: _histc,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
}


class _Shapes(Interpreter):
    """Runs a graph on the meta device and compares every value with what the analysis says is left of it."""

    def __init__(self, graph_module: GraphModule, s: _Sizes) -> None:
        super().__init__(graph_module)
        self.s = s

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        return map_aggregate(
            super().fetch_args_kwargs_from_env(n),
            lambda value: torch.device("meta") if isinstance(value, torch.device) else value,
        )

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.name in self.s.dims_of and n.op != "placeholder":
            dims = self.s.dims(n)
            for i, (size, dim) in enumerate(zip(value.shape, dims, strict=True)):
                left = self.s.narrowing.size(dim)
                assert left.symbols or left.coefficient == size, (
                    f"dimension {i} of {n.name} ({n.target}) is {size}, the analysis says {left}"
                )
        return value


def shape_constants(dims_of: Mapping[str, Result], narrowing: Narrowing) -> Pass:
    """`dims_of`: node name -> dimensions of the teacher's value."""
    sizes = _Sizes(dims_of, narrowing)

    def run(graph_module: GraphModule) -> None:
        for node in graph_module.graph.nodes:
            sizes.rewrite(node)

    def ensures(graph_module: GraphModule) -> None:
        ids = torch.zeros(2, fixed_length(graph_module.graph) or 3, dtype=torch.long, device="meta")
        with torch.no_grad():
            _Shapes(graph_module, sizes).run(ids)

    return Pass("shape_constants", run, ensures)
