"""Tiny modules under the axis analysis, and the property that every op rule must have.

An axis that the analysis leaves free is one that can be permuted and narrowed. `check` tries it on the real function:

    permuting   the parameters and inputs along a free leaf changes nothing but the order of the outputs along that leaf
    narrowing   the graph that is left runs, and every value in it has the size that the analysis says
    masking     where the analysis has no note of a leaf, dropping indices is the same as setting them to zero

What an index of a leaf is in a tensor is worked out here anew, by arithmetic on whole index arrays, and not by
`compiler.axes.narrowing`, which the tests hold against it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from minitron.compiler.axes.analysis import analyse
from minitron.compiler.axes.dims import Atom, Dim, Dims, Size, Space
from minitron.compiler.axes.narrowing import Indices, Narrowing
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.models import canonical_names, quiet
from minitron.compiler.graph.graph_module import rebuild, set_attribute
from minitron.compiler.graph.names import strip_wrapper
from minitron.compiler.rewrite.shape_constants import shape_constants

Lists = Mapping[Atom, Indices]
BATCH, SEQUENCE = (torch.export.Dim(name, min=1, max=1 << 20) for name in ("batch", "sequence"))
TOKENS = {0: BATCH, 1: SEQUENCE}


class Toy(torch.nn.Module):
    """A module out of parameters, by name, and a function of it and its inputs."""

    def __init__(self, function: Callable[..., torch.Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Traced:
    """A module, what the analysis says of it, and the inputs that it is tried on."""

    module: torch.nn.Module
    graph_module: GraphModule
    inputs: tuple[torch.Tensor, ...]
    table: AxisTable
    sizes: Mapping[str, int]

    @property
    def space(self) -> Space:
        return self.table.space

    @property
    def placeholders(self) -> list[Node]:
        return [node for node in self.graph_module.graph.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> list[Node]:
        (result,) = next(node for node in self.graph_module.graph.nodes if node.op == "output").args
        return [node for node in (result if isinstance(result, tuple | list) else [result]) if node is not None]

    def describe(self, name: str) -> list[str]:
        """The dimensions of a parameter, of the first input (`x`) or of the first output (`y`), in words."""
        return [self.space.describe(dim) for dim in self.dims(name)]

    def dims(self, name: str) -> Dims:
        if name in self.table.parameters:
            return self.table.parameters[name]
        return self.table.dims({"x": self.placeholders, "y": self.outputs}[name][0])

    def leaf(self, name: str, axis: int) -> Atom:
        """The one leaf that a dimension is."""
        (leaf,) = self.space.leaves(self.dims(name)[axis])
        return leaf

    def same(self, *axes: tuple[str, int]) -> bool:
        """Whether all these dimensions are made of the very same leaves."""
        return len({tuple(self.space.leaves(self.dims(name)[axis])) for name, axis in axes}) == 1

    def pins(self, name: str, axis: int) -> str:
        """All reasons that stand against narrowing a dimension."""
        return "; ".join(sorted({str(pin) for leaf in self.space.leaves(self.dims(name)[axis]) for pin in leaf.pins}))

    def notes(self, name: str, axis: int) -> set[str]:
        return {note.kind for leaf in self.space.leaves(self.dims(name)[axis]) for note in leaf.notes}

    def free(self) -> list[Atom]:
        """The leaves of parameters and inputs that nothing speaks against narrowing."""
        every = [*self.table.parameters.values(), *(self.table.dims(node) for node in self.placeholders)]
        leaves = {leaf: None for dims in every for dim in dims for leaf in self.space.leaves(dim)}
        return [leaf for leaf in leaves if not leaf.pins and not leaf.size.symbols and leaf.size.coefficient > 1]

    # -- the function -------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in self.module.named_parameters()}

    def run(self, lists: Lists, change: Callable[[torch.Tensor, list[Indices]], torch.Tensor]) -> list[torch.Tensor]:
        """The outputs with every parameter and input changed according to the index lists of its dimensions."""
        parameters = {
            name: change(value, self.positions(self.table.parameters[name], lists, value))
            if name in self.table.parameters
            else value
            for name, value in self.parameters().items()
        }
        inputs = tuple(
            change(value, self.positions(self.table.dims(node), lists, value))
            for node, value in zip(self.placeholders, self.inputs, strict=True)
        )
        with torch.no_grad():
            return as_list(torch.func.functional_call(self.module, parameters, copy.deepcopy(inputs)))

    def positions(self, dims: Dims, lists: Lists, value: torch.Tensor) -> list[Indices]:
        """For every dimension of `value` as it was, the indices that are left."""
        return [
            kept_positions(self.space, dim, lists, self.sizes)
            if any(leaf in lists for leaf in self.space.leaves(dim))
            else np.arange(size)
            for dim, size in zip(dims, value.shape, strict=True)
        ]

    def picked(self, values: list[torch.Tensor], lists: Lists) -> list[torch.Tensor]:
        """Outputs along whose dimensions only the listed indices are taken."""
        return [
            take(value, self.positions(self.table.dims(node), lists, value))
            for node, value in zip(self.outputs, values, strict=True)
        ]

    def narrowed(self, lists: Lists) -> list[torch.Tensor]:
        """The outputs of the rewritten graph; asserts the sizes of every value in it."""
        graph_module = rebuild(self.graph_module)
        narrowing = Narrowing(self.space, lists)
        dims_of = {node.name: dims for node, dims in self.table.nodes.items()}
        for node in graph_module.graph.nodes:
            if node.op == "get_attr" and strip_wrapper(str(node.target)) in self.table.parameters:
                name = strip_wrapper(str(node.target))
                value = self.parameters()[name]
                left = take(value, self.positions(self.table.parameters[name], lists, value))
                set_attribute(graph_module, str(node.target), left)
        shape_constants(dims_of, narrowing).run(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
        inputs = [
            take(value, self.positions(self.table.dims(node), lists, value))
            for node, value in zip(self.placeholders, self.inputs, strict=True)
        ]
        with torch.no_grad():
            return as_list(_Sized(graph_module, self, lists).run(*inputs))


class _Sized(Interpreter):
    def __init__(self, graph_module: GraphModule, traced: Traced, lists: Lists) -> None:
        super().__init__(graph_module)
        self.dims_of = {node.name: dims for node, dims in traced.table.nodes.items()}
        self.traced, self.lists = traced, lists

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.name in self.dims_of:
            dims: Dims = self.dims_of[n.name]  # type: ignore[assignment]
            wanted = [len(p) for p in self.traced.positions(dims, self.lists, value)]
            assert list(value.shape) == wanted, f"{n.format_node()} is {list(value.shape)}, not {wanted}"
        return value


def kept_positions(space: Space, dim: Dim, lists: Lists, sizes: Mapping[str, int]) -> Indices:
    """Which indices of a dimension are left, in their order."""
    result = np.zeros(1, dtype=np.int64)
    for atom in space.flat(dim):
        if atom in lists:
            own, size = lists[atom], actual(atom.size, sizes)
        elif atom.parts is not None:
            size, pieces = 0, []
            for part in atom.parts:
                pieces.append(size + kept_positions(space, part, lists, sizes))
                size += len(kept_positions(space, part, {}, sizes))
            own = np.concatenate(pieces)
        else:
            size = actual(atom.size, sizes)
            own = np.arange(size)
        result = np.add.outer(result * size, own).reshape(-1)
    return result


def actual(size: Size, sizes: Mapping[str, int]) -> int:
    """A size with numbers in place of its symbols."""
    return int(size.coefficient * np.prod([eval(symbol, {}, dict(sizes)) for symbol in size.symbols], dtype=int))


def take(value: torch.Tensor, positions: list[Indices]) -> torch.Tensor:
    return value[np.ix_(*positions)].contiguous() if positions else value


def as_list(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple | list) else [value]


def trace(
    module: torch.nn.Module,
    *inputs: torch.Tensor,
    dynamic: tuple[dict[int, Any] | None, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Traced:
    """Exports a module as `capture` does it, with random parameters, and analyses it."""
    generator = torch.Generator().manual_seed(0)
    module = module.to(dtype).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))
    inputs = tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)
    shapes: Any = None if dynamic is None else dynamic
    if isinstance(module, Toy) and shapes is not None:
        shapes = (shapes,)
    with quiet(), torch.no_grad():
        program = torch.export.export(module, copy.deepcopy(inputs), dynamic_shapes=shapes, strict=False)
        graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    names = canonical_names(module)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.target = names.get(str(node.target), node.target)
    graph_module.recompile()
    config = SimpleNamespace(model_type="toy")
    captured = Captured(graph_module, module, config, "sdpa", dtype, names, "layers", 0)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    sizes = {
        str(symbol.node.expr): number
        for node, value in zip(placeholders, inputs, strict=True)
        for symbol, number in zip(node.meta["val"].shape, value.shape, strict=True)
        if not isinstance(symbol, int)
    }
    return Traced(module, graph_module, inputs, analyse(captured), sizes)


def check(
    module: torch.nn.Module, *inputs: torch.Tensor, dynamic: tuple[dict[int, Any] | None, ...] | None = None
) -> Traced:
    """Traces a module and tries every leaf that the analysis leaves free. Returns what was traced."""
    traced = trace(module, *inputs, dynamic=dynamic)
    for leaf in traced.free():
        assert_free(traced, leaf)
    return traced


def assert_free(traced: Traced, leaf: Atom) -> None:
    """The three properties of the module docstring, for one leaf."""
    size = leaf.size.coefficient
    order = np.random.default_rng(size).permutation(size)
    if (order == np.arange(size)).all():
        order = order[::-1].copy()
    before = traced.run({}, take)
    what = f"leaf of {size} in " + ", ".join(
        f"{name} {traced.describe(name)}"
        for name in traced.table.parameters
        if any(leaf in traced.space.leaves(dim) for dim in traced.dims(name))
    )
    assert_same(traced.run({leaf: order}, take), traced.picked(before, {leaf: order}), f"permuted: {what}")
    kept = {leaf: np.sort(order[: (size + 1) // 2])}
    left = traced.narrowed(kept)
    if not leaf.notes:
        assert_same(left, traced.picked(traced.run(kept, mask), kept), f"masked: {what}")


def matters(traced: Traced, name: str, axis: int) -> bool:
    """Whether exchanging some two neighbours of a leaf, against the analysis, changes the function, as of a pinned one."""
    leaf = traced.leaf(name, axis)
    before = traced.run({}, take)
    for index in range(leaf.size.coefficient - 1):
        order = np.arange(leaf.size.coefficient)
        order[[index, index + 1]] = order[[index + 1, index]]
        wanted, got = traced.picked(before, {leaf: order}), traced.run({leaf: order}, take)
        if not all(torch.allclose(a.double(), b.double()) for a, b in zip(wanted, got, strict=True)):
            return True
    return False


def mask(value: torch.Tensor, positions: list[Indices]) -> torch.Tensor:
    """Zero wherever an index is not listed."""
    for axis, kept in enumerate(positions):
        keep = torch.zeros(value.shape[axis], dtype=torch.bool)
        keep[kept] = True
        value = value * keep.reshape(-1, *[1] * (value.ndim - axis - 1))
    return value


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor], what: str) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape, f"{what}: {list(a.shape)} against {list(b.shape)}"
        error = 3e-4 if a.dtype == torch.float32 else 1e-9
        a, b = a.double(), b.double()
        assert torch.allclose(a, b, rtol=error, atol=error * float(b.abs().max()) if b.numel() else 0.0), what
