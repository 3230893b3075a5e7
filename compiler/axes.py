"""The dimension analysis: walks the captured graph once and says which axes belong together.

Every node gets one `Dim` per dimension from the rule of its operator (`rules/`). Parameters start with fresh dimensions;
buffers are computed by the model's own code when it is loaded, so they are pinned, and with them whatever they touch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from minitron.compiler.capture.capture import Captured
from minitron.compiler.dims import Atom, Dim, Note, Pin, Size, Space, size_of
from minitron.compiler.graph.aten import op_name
from minitron.compiler.graph.names import strip_wrapper
from minitron.compiler.positions import Meaning, Offsets, Positions, Sorted
from minitron.compiler.rules import POSITIONS, RULES, Dims, Result, experts


@dataclass(frozen=True)
class Contraction:
    """`value[.., k]` meets `weight[.., k]` at `node`; `dim` is the axis k. `weight` is None between two activations."""

    node: Node
    value: Node
    weight: str | None
    dim: Dim


@dataclass(frozen=True)
class AttentionSite:
    """One attention: `heads` are its query heads (slow: key-value groups, fast: repeats), `value` the width of a value."""

    node: Node
    heads: Dim
    value: Dim


@dataclass(frozen=True)
class AxisTable:
    """What the analysis found. `parameters`: canonical parameter name -> dimensions; `nodes`: the same for every value.

    `meanings` and `sorted` are of `compiler.positions`: what integers stand for, and rows in the order of an axis.
    """

    space: Space
    parameters: dict[str, Dims]
    nodes: dict[Node, Result]
    contractions: list[Contraction]
    attentions: list[AttentionSite]
    unknown: dict[str, list[str]]
    meanings: dict[Any, Meaning] = field(default_factory=dict)
    sorted: list[Sorted] = field(default_factory=list)

    def dims(self, node: Node) -> Dims:
        """The dimensions of a single tensor."""
        return self.nodes[node]  # type: ignore[return-value]

    def results(self, node: Node) -> list[Dims]:
        """The dimensions of each result."""
        return each(self.nodes[node])


class Tracer:
    """What op rules see: the space of atoms, and the node that they are asked about."""

    def __init__(self, captured: Captured) -> None:
        self.space = Space()
        self.captured = captured
        self.nodes: dict[Node, Result] = {}
        self.parameters: dict[str, Dims] = {}
        self.contractions: list[Contraction] = []
        self.attentions: list[tuple[Node, Dim, Dim]] = []
        self.softmaxes: list[tuple[Node, int]] = []
        self.meanings: dict[Any, Meaning] = {}  # by node, or (node, number of the result)
        self.sorted: list[Sorted] = []
        self.ordered: list[Dim] = []  # rows that stand in an order of their own: those of the input, and of what is cut
        self.unknown: dict[str, list[str]] = {}

    # -- reading nodes ------------------------------------------------------------------------------------------------

    def dims(self, node: Any) -> Dims:
        """The dimensions of an operand; scalars have none."""
        return self.nodes[node] if isinstance(node, Node) and node in self.nodes else []  # type: ignore[return-value]

    def operands(self, node: Node) -> list[Node]:
        """All tensor operands."""
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]

    def arg(self, node: Node, index: int, default: Any = None, name: str | None = None) -> Any:
        """An argument by its position in the schema, wherever it was written."""
        if index < len(node.args):
            return node.args[index]
        if isinstance(node.target, torch._ops.OpOverload):
            arguments = node.target._schema.arguments
            named = name or (arguments[index].name if index < len(arguments) else None)
            if named in node.kwargs:
                return node.kwargs[named]
        return default

    def named(self, node: Node, name: str, default: Any = None) -> Any:
        """An argument by its name in the schema, for operators that differ in its position, or do not all have it."""
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        return self.arg(node, names.index(name), default) if name in names else default

    def integer(self, node: Node, index: int) -> int:
        value = self.arg(node, index)
        assert isinstance(value, int), f"{node.target} argument {index} is {value!r}"
        return value

    def sizes(self, node: Node) -> list[Size]:
        return self.result_sizes(node)[0]

    def result_sizes(self, node: Node) -> list[list[Size]]:
        """One list of sizes a result, in their order; an empty one where a result is no tensor."""
        value = node.meta.get("val")
        results = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        return [[Size.of(s) for s in getattr(result, "shape", ())] for result in results]

    def is_single(self, node: Node) -> bool:
        return isinstance(node.meta.get("val"), torch.Tensor)

    def rank(self, node: Node) -> int:
        return len(self.sizes(node))

    def place(self, node: Node) -> str:
        """The op and the module it stands in, for people."""
        return f"{op_name(node)} in {self.captured.module_of(node) or 'the model'}"

    # -- what rules say -----------------------------------------------------------------------------------------------

    def broadcast(self, operands: Sequence[Dims], rank: int, place: str) -> Dims:
        """Unifies operands aligned at their last dimensions; dimensions of one follow the others."""
        result: Dims = [()] * rank
        for dims in operands:
            for back, dim in enumerate(reversed(dims), start=1):
                if dim and result[-back]:
                    self.space.unify(result[-back], dim, place)
                result[-back] = result[-back] or dim
        return result

    def contract(self, node: Node, value: Any, weight: Any, read: Dim, contracted: Dim) -> None:
        """A contraction: `read` of `value` is summed against `contracted` of `weight`."""
        self.space.unify(read, contracted, self.place(node))
        name = self.captured.parameter_behind(weight)
        self.contractions.append(Contraction(node, value, name, contracted))

    def note(self, dim: Dim, kind: str, node: Node) -> None:
        self.space.note(dim, Note(kind, node.name, self.place(node)))

    def lose(self, dim: Dim, size: Size, reason: str, place: str) -> Dim:
        """A new dimension, of `size`, for indices of `dim` that the algebra cannot follow: the widths in both are pinned.

        Batch and sequence are no widths: nothing stands against cutting them.
        """
        result = self.space.fresh(size)
        self.ordered += [dim, result]
        for part in (dim, result):
            self.space.pin(tuple(a for a in self.space.flat(part) if a.size.coefficient != 1), reason, place)
        return result

    def opaque(self, node: Node) -> Result:
        """Nothing is known of this operator: everything it touches is pinned."""
        place = self.place(node)
        self.read_as_numbers(node)
        self.unknown.setdefault(op_name(node), []).append(self.captured.module_of(node))
        reason = "an operator that the analysis has no rule for"
        for operand in node.all_input_nodes:
            for dims in each(self.nodes.get(operand, [])):
                for dim in dims:
                    self.space.pin(dim, reason, place)
        results: list[Dims] = [[self.space.fresh(size) for size in sizes] for sizes in self.result_sizes(node)]
        for dims in results:
            for dim in dims:
                self.space.pin(dim, reason, place)
        return results[0] if self.is_single(node) else results

    # -- what integers stand for (see `compiler.positions`) -----------------------------------------------------------------

    def positions(self, operand: Any) -> Positions | None:
        """The axis that the values of an operand are positions along, for rules that treat them so."""
        meaning = self.meanings.get(operand) if isinstance(operand, Node) else None
        if isinstance(meaning, Offsets):  # only `grouped_mm` knows what these are
            self.numbers(meaning, "")
        return meaning if isinstance(meaning, Positions) else None

    def means(self, node: Node, meaning: Meaning, result: int | None = None) -> None:
        """Says what the values of a node, or of one of its results, stand for."""
        self.meanings[node if result is None else (node, result)] = meaning

    def numbers(self, meaning: Meaning | None, place: str) -> None:
        """What `place` reads are numbers: the axis that they count cannot be numbered anew."""
        if isinstance(meaning, Positions):
            self.space.pin(meaning.of, meaning.reason, meaning.place or place)
        elif isinstance(meaning, Offsets):
            self.space.pin(meaning.of, "its order matters", place)

    def read_as_numbers(self, node: Node) -> None:
        """`node` reads all of its operands as numbers."""
        for operand in node.all_input_nodes:
            self.numbers(self.meanings.get(operand), self.place(node))

    def carry(self, node: Node, how: str) -> None:
        """The values of the results are those of the first operand, or some of them."""
        meaning = self.meanings.get(node.args[0])
        if meaning is None:
            return
        if how == "some" and not isinstance(meaning, Positions):
            self.numbers(meaning, self.place(node))
            return
        for result in [None] if self.is_single(node) else range(len(self.result_sizes(node))):
            self.means(node, replace(meaning, source=node) if how == "some" else meaning, result)

    def is_sorted_by(self, rows: Dim, source: Node) -> bool:
        """Whether rows stand in the order of the positions in `source`."""
        roots = self.space.flat(rows)
        return any(len(roots) == 1 and self.space.find(s.rows) is roots[0] and s.source is source for s in self.sorted)

    def anew(self, dim: Dim) -> Dim:
        """The same dimension with rows (batch, sequence and what they make up) of its own."""
        rows = {self.space.find(s.rows) for s in self.sorted}
        result: list[Atom] = []
        for atom in self.space.flat(dim):
            alone = atom.size.symbols and (atom.size.coefficient == 1 or atom in rows)
            result += self.space.fresh(atom.size) if alone else (atom,)
        return tuple(result)

    # -- the walk -----------------------------------------------------------------------------------------------------

    def visit(self, node: Node) -> None:
        value = node.meta.get("val")
        if node.op == "get_attr":
            if isinstance(value, torch.Tensor):  # or it is a sub-graph, whose operator has no rule
                self.nodes[node] = self._attribute(node)
        elif node.op == "placeholder":
            self.nodes[node] = [self.space.fresh(size) for size in self.sizes(node)]
            self.ordered += self.dims(node)
        elif node.op == "output":
            self.read_as_numbers(node)
        elif node.target is operator.getitem:
            source, position = node.args
            self.nodes[node] = self.nodes[source][position]  # type: ignore[index,assignment]
            if (source, position) in self.meanings:
                self.means(node, self.meanings[source, position])
        elif node.op == "call_function" and (isinstance(value, torch.Tensor | list | tuple) or value is None):
            rule: Callable[[Tracer, Node], Result] | None = RULES.get(node.target)
            self.nodes[node] = rule(self, node) if rule is not None else self.opaque(node)
            treatment = POSITIONS.get(node.target)
            if treatment is None:
                self.read_as_numbers(node)
            elif treatment != "own":
                self.carry(node, treatment)
            self._check(node)
        elif node.op == "call_function" and node.target not in SIZES_ONLY:
            self.read_as_numbers(node)

    def _check(self, node: Node) -> None:
        """A rule that returns dimensions of a wrong size would make everything after it wrong."""
        if self.is_single(node):
            got = [size_of(dim) for dim in self.dims(node)]
            assert got == self.sizes(node), f"the rule of {self.place(node)} gives {got} for {self.sizes(node)}"

    def _attribute(self, node: Node) -> Dims:
        sizes = self.sizes(node)
        name = self.captured.parameter_behind(node)
        if name is None:
            dims = [self.space.fresh(size) for size in sizes]
            for dim in dims:
                self.space.pin(
                    dim, "a table that the model computes for itself when it is loaded", strip_wrapper(str(node.target))
                )
            return dims
        if name not in self.parameters:
            self.parameters[name] = [self.space.fresh(size) for size in sizes]
        return self.parameters[name]


def each(result: Result) -> list[Dims]:
    """One list of dimensions, or several: a `Dim` is a tuple, a list of them a list."""
    return result if result and isinstance(result[0], list) else [result]  # type: ignore[list-item]


# What these read of a tensor is its shape.
SIZES_ONLY = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int}


def analyse(captured: Captured) -> AxisTable:
    """Runs the analysis over a captured teacher."""
    experts.register()
    tracer = Tracer(captured)
    for node in captured.graph.nodes:
        tracer.visit(node)
    attentions = [AttentionSite(node, heads, value) for node, heads, value in tracer.attentions]
    attentions += _softmax_attention(tracer)
    tracer.space.settle()
    _hold_what_rows_depend_on(tracer)
    return AxisTable(
        tracer.space, tracer.parameters, tracer.nodes, tracer.contractions, attentions, dict(tracer.unknown),
        tracer.meanings, tracer.sorted,
    )  # fmt: skip


def _softmax_attention(t: Tracer) -> list[AttentionSite]:
    """Attention written out: a softmax over the key positions whose result is contracted with the values.

    Positions are symbols, or as many as the graph's tokens where it is of one number of them: [.., queries, keys] then.
    """
    activations = {c.value: c for c in t.contractions if c.weight is None}
    sites = []
    for node, axis in t.softmaxes:
        sizes = [size_of(dim) for dim in t.dims(node)]
        square = len(sizes) == 4 and sizes[2] == sizes[3] and sizes[3].coefficient == t.captured.length
        if not (sizes[axis].symbols or square):
            continue
        reader = node
        while reader not in activations and len(reader.users) == 1:
            reader = next(iter(reader.users))
        if reader in activations:
            product = activations[reader].node
            sites.append(AttentionSite(product, t.dims(node)[1], t.dims(product)[-1]))
    return sites


def _hold_what_rows_depend_on(t: Tracer) -> None:
    """Rows that were put in the order of an axis, and whose order turned out to matter, hold the numbering of that axis.

    That axis may itself be one of rows, so this goes on until nothing is left to hold.
    """
    ordered = {leaf for dim in t.ordered for leaf in t.space.leaves(dim)}
    roots = [t.space.find(one.rows) for one in t.sorted]
    left = list(zip(roots, t.sorted, strict=True))
    while held := [
        (root, one)
        for root, one in left
        if root.factors is not None or root.parts is not None or root in ordered or root.pins or roots.count(root) > 1
    ]:
        left = [pair for pair in left if pair not in held]
        for _, one in held:
            for leaf in t.space.leaves(one.by):
                leaf.pins.add(Pin("rows that are sorted by it are read in their order", one.place))
