"""The interface of op rules to the graph walk: the space of atoms, and the node whose rule is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from minitron.compiler.axes.dims import Atom, Dim, Dims, Note, Result, Size, Space
from minitron.compiler.axes.index_meaning import Meaning, Offsets, Positions, Sorted
from minitron.compiler.axes.table import Contraction, each
from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import argument, op_name


class Tracer:
    """The state that op rules read and write: the space of atoms, and the dimensions and meanings of every node."""

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

    def arg(self, node: Node, which: int | str, default: Any = None) -> Any:
        """An argument by its position or name in the schema, as `graph.aten.argument` reads it."""
        return argument(node, which, default)

    def integer(self, node: Node, index: int) -> int:
        value = self.arg(node, index)
        assert isinstance(value, int), f"{node.target} argument {index} is {value!r}"
        return value

    def sizes(self, node: Node) -> list[Size]:
        return self.result_sizes(node)[0]

    def result_sizes(self, node: Node) -> list[list[Size]]:
        """One list of sizes for each result, in their order; an empty one where a result is not a tensor."""
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
        """Records a contraction: `read` of `value` is summed against `contracted` of `weight`."""
        self.space.unify(read, contracted, self.place(node))
        name = self.captured.parameter_behind(weight)
        self.contractions.append(Contraction(node, value, name, contracted))

    def note(self, dim: Dim, kind: str, node: Node) -> None:
        self.space.note(dim, Note(kind, node.name, self.place(node)))

    def untracked(self, dim: Dim, size: Size, reason: str, place: str) -> Dim:
        """A new dimension, of `size`, for indices of `dim` that the algebra cannot follow: the widths in both are pinned.

        Batch and sequence are not widths: they may be cut.
        """
        result = self.space.fresh(size)
        self.ordered += [dim, result]
        for part in (dim, result):
            self.space.pin(tuple(a for a in self.space.flat(part) if a.size.coefficient != 1), reason, place)
        return result

    def opaque(self, node: Node) -> Result:
        """Pins every dimension that an operator without a rule touches."""
        place = self.place(node)
        self.pin_operands_as_values(node)
        self.unknown.setdefault(op_name(node), []).append(self.captured.module_of(node))
        reason = "the analysis has no rule for this operator"
        for operand in node.all_input_nodes:
            for dims in each(self.nodes.get(operand, [])):
                for dim in dims:
                    self.space.pin(dim, reason, place)
        results: list[Dims] = [[self.space.fresh(size) for size in sizes] for sizes in self.result_sizes(node)]
        for dims in results:
            for dim in dims:
                self.space.pin(dim, reason, place)
        return results[0] if self.is_single(node) else results

    # -- what integers stand for (see `index_meaning`) ---------------------------------------------------------------

    def positions(self, operand: Any) -> Positions | None:
        """The axis that the values of an operand are positions along, for rules that treat them so."""
        meaning = self.meanings.get(operand) if isinstance(operand, Node) else None
        if isinstance(meaning, Offsets):  # only `grouped_mm` knows what these are
            self.pin_as_values(meaning, "")
        return meaning if isinstance(meaning, Positions) else None

    def set_meaning(self, node: Node, meaning: Meaning, result: int | None = None) -> None:
        """Records what the values of a node, or of one of its results, stand for."""
        self.meanings[node if result is None else (node, result)] = meaning

    def pin_as_values(self, meaning: Meaning | None, place: str) -> None:
        """Pins the axis of `meaning`: the operator at `place` reads positions as plain values, so the axis keeps its
        numbering."""
        if isinstance(meaning, Positions):
            self.space.pin(meaning.of, meaning.reason, meaning.place or place)
        elif isinstance(meaning, Offsets):
            self.space.pin(meaning.of, "its order matters", place)

    def pin_operands_as_values(self, node: Node) -> None:
        """Pins the axes of all operands that hold positions: `node` reads them as plain values."""
        for operand in node.all_input_nodes:
            self.pin_as_values(self.meanings.get(operand), self.place(node))

    def forward_meaning(self, node: Node, how: str) -> None:
        """Gives the results the meaning of the first operand: they hold its values, or some of them."""
        meaning = self.meanings.get(node.args[0])
        if meaning is None:
            return
        if how == "some" and not isinstance(meaning, Positions):
            self.pin_as_values(meaning, self.place(node))
            return
        for result in [None] if self.is_single(node) else range(len(self.result_sizes(node))):
            self.set_meaning(node, replace(meaning, source=node) if how == "some" else meaning, result)

    def is_sorted_by(self, rows: Dim, source: Node) -> bool:
        """Checks whether the rows are sorted by the positions in `source`."""
        roots = self.space.flat(rows)
        return any(len(roots) == 1 and self.space.find(s.rows) is roots[0] and s.source is source for s in self.sorted)

    def fresh_rows(self, dim: Dim) -> Dim:
        """The same dimension with rows (batch, sequence and what they make up) of its own."""
        rows = {self.space.find(s.rows) for s in self.sorted}
        result: list[Atom] = []
        for atom in self.space.flat(dim):
            alone = atom.size.symbols and (atom.size.coefficient == 1 or atom in rows)
            result += self.space.fresh(atom.size) if alone else (atom,)
        return tuple(result)
