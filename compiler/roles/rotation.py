"""Decides from the graph whether the residual stream can be rotated, and what a rotation does to every parameter.

A decoder whose norms take the root mean square only is the same function after x -> x Q for an orthogonal Q, once every
norm weight is folded into the projections that read the norm (SliceGPT, arXiv 2401.15024, with one Q for the network), up
to one number for the whole norm, which commutes with Q:

    the embedding, and whatever writes into the stream, yields x Q
    a projection that reads the stream takes x Q, or x Q after a norm whose weight is the same for all channels
    sums, products with scalars, copies and gathers of whole rows commute with Q; a mean square does not see it

`find_rotation` walks the graph once and holds each operator on the hidden axis against this list. One that is not on it
refuses the rotation, with the operator's place. Every compile compares the logits before and after besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from minitron.compiler.axes.dims import Atom
from minitron.compiler.axes.table import AxisTable, Contraction
from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import MOVES, argument, op_name
from minitron.compiler.roles.roles import Roles
from minitron.specs.errors import UsageError

ADDS = {"add", "add_", "sub"}
PRODUCTS = {"mul", "div", "mul_", "div_"}
SAME_VALUES = MOVES | {
    "dropout", "unsqueeze", "squeeze", "expand", "expand_as", "index", "index_select", "slice", "narrow", "cat", "stack",
    "split", "split_with_sizes", "chunk", "select", "repeat", "repeat_interleave", "index_put", "index_put_", "index_add",
    "index_add_", "getitem", "movedim", "pad",
}  # fmt: skip
LIKE_ANOTHER = {"type_as", "view_as", "reshape_as", "expand_as"}
ZEROS = {"zeros", "zeros_like", "new_zeros"}


@dataclass(frozen=True)
class Site:
    """A normalised value of the residual stream: the node of that name, or what is left of it once it is `normalised` by its
    root mean square, where one operator is the whole norm."""

    node: str
    normalised: bool = True


@dataclass(frozen=True)
class Fold:
    """The weight of one norm: the norm multiplies the value at `site` by `parameter` + `shift`."""

    parameter: str
    shift: float
    site: Site


@dataclass(frozen=True)
class Tied:
    """A parameter that is the embedding and reads the stream behind the norm of `fold`."""

    parameter: str
    fold: Fold


@dataclass(frozen=True)
class Rotation:
    """The effect of a rotation on the parameters.

    axes     parameter -> the dimensions that carry the residual stream; norm weights are not in it
    folds    norm weight -> its fold
    reads    parameter -> the norm whose weight is folded into it
    tied     the embedding where it is a projection behind a norm as well, with that norm: no one matrix can have the norm's
             weight folded in and be the embedding
    sites    what the norms yield before their weights: the covariance of these values decides the basis
    head_site  of these the last, which is read outside the layers
    """

    axes: Mapping[str, tuple[int, ...]]
    folds: Mapping[str, Fold]
    reads: Mapping[str, str]
    tied: Tied | None
    sites: tuple[Site, ...]
    head_site: Site | None = None


@dataclass(frozen=True)
class _State:
    """A value along the hidden axis. `kind`: stream, square (its elementwise square), vector (a parameter of one
    dimension), matrix (any other parameter), weighted (a normalised stream times a norm's weight)."""

    kind: str
    parameter: str | None = None
    shift: float = 0.0
    site: Site | None = None


STREAM = _State("stream")


def find_rotation(captured: Captured, table: AxisTable, roles: Roles) -> Rotation:
    """Raises UsageError with the operator that does not commute with a rotation."""
    return _Walk(captured, table, roles.hidden.leaf).run()


class _Walk:
    def __init__(self, captured: Captured, table: AxisTable, hidden: Atom) -> None:
        self.captured, self.table, self.hidden = captured, table, hidden
        self.states: dict[Node, _State] = {}
        self.contractions: dict[Node, list[Contraction]] = {}
        for one in table.contractions:
            self.contractions.setdefault(one.node, []).append(one)
        self.axes: dict[str, tuple[int, ...]] = {}
        self.folds: dict[str, Fold] = {}
        self.reads: dict[str, set[str | None]] = {}
        self.written: set[str] = set()  # parameters that the stream is made of as they are
        self.sites: dict[str, Site] = {}

    def run(self) -> Rotation:
        for node in self.captured.graph.nodes:
            if node.op == "output" or node not in self.table.nodes:
                continue
            if node.op == "get_attr":
                self._parameter(node)
            elif node.op == "call_function" and (self._touched(node) or self._operands(node)):
                state = self._visit(node)
                if state is not None:
                    self.states[node] = state
        return self._result()

    # -- what is asked of the analysis ------------------------------------------------------------------------------

    def _places(self, node: Node) -> list[int]:
        """The dimensions of a value that carry the hidden axis."""
        found = []
        space = self.table.space
        for dims in self.table.results(node):
            for place, dim in enumerate(dims):
                if any(leaf is self.hidden for leaf in space.leaves(dim)):
                    if tuple(space.flat(dim)) != (self.hidden,):
                        raise self._refusal(node, "joins the residual stream with another axis")
                    found.append(place)
        return found

    def _touched(self, node: Node) -> bool:
        return bool(self._places(node))

    def _operands(self, node: Node) -> list[Node]:
        """Operands that carry the hidden axis, whatever they are."""
        return [source for source in node.all_input_nodes if source in self.states]

    def _refusal(self, node: Node, what: str) -> UsageError:
        place = self.captured.module_of(node) or "the model"
        return UsageError(f"{op_name(node)} in {place} {what}")

    # -- the walk ---------------------------------------------------------------------------------------------------

    def _parameter(self, node: Node) -> None:
        name = self.captured.parameter_behind(node)
        places = self._places(node)
        if name is None or not places:
            return
        single = len(self.table.dims(node)) == 1
        self.states[node] = _State("vector" if single else "matrix", name)

    def _visit(self, node: Node) -> _State | None:
        name, operands = op_name(node), self._operands(node)
        if not operands:
            if name in ZEROS or (name in ("full", "full_like", "new_full") and node.args[1] == 0):
                return STREAM
            raise self._refusal(node, "makes a value along the residual stream out of something else")
        if len(operands) == 1 and self.states[operands[0]].kind in ("vector", "matrix"):
            taken = self._of_parameter(node, name, operands[0])
            if taken is not None:
                return taken
        if node in self.contractions or name in ("linear", "addmm", "matmul", "mm", "bmm", "einsum"):
            return self._contraction(node)
        if name in ("layer_norm", "native_layer_norm"):
            raise self._refusal(node, "subtracts the mean over the channels, which no rotation of them keeps")
        if name == "rms_norm":
            return self._whole_norm(node)
        if name in ADDS:
            return self._sum(node, operands)
        if name in PRODUCTS:
            return self._product(node, name, operands)
        if name in LIKE_ANOTHER:  # of the second operand it takes shape or dtype
            operands = [one for one in operands if one is node.args[0]] or operands
        (first, *others) = (self.states[one] for one in operands)
        if name == "pow" and first == STREAM and node.args[1] == 2:
            return _State("square")
        if name in ("mean", "sum", "linalg_vector_norm", "norm"):
            return self._reduction(node, name, first)
        if name in SAME_VALUES and all(one == first for one in others):
            return first if self._touched(node) else None
        raise self._refusal(node, "takes the channels of the residual stream one by one, which a rotation mixes")

    def _of_parameter(self, node: Node, name: str, source: Node) -> _State | None:
        """Handles a node that transforms a parameter before the parameter meets the stream; None where both meet in
        this node."""
        state = self.states[source]
        assert state.parameter is not None
        if name == "embedding" and node.args[0] is source:
            self._carries(state.parameter)
            self.written.add(state.parameter)
            return STREAM
        if name in SAME_VALUES and node.args[0] is source:
            return state
        if name in ("add", "add_") and state.kind == "vector" and isinstance(node.args[1], int | float):
            return _State("vector", state.parameter, state.shift + float(node.args[1]))
        return None

    def _carries(self, name: str) -> None:
        space = self.table.space
        self.axes[name] = tuple(
            place for place, dim in enumerate(self.table.parameters[name]) if tuple(space.flat(dim)) == (self.hidden,)
        )

    def _contraction(self, node: Node) -> _State | None:
        for one in self.contractions.get(node, []):
            reads = tuple(self.table.space.flat(one.dim)) == (self.hidden,)
            if not reads:
                continue
            state = self.states.get(one.value)
            if one.weight is None or state is None:
                raise self._refusal(node, "multiplies two values of the residual stream with each other")
            self._read(node, one, state)
        if node not in self.contractions:
            raise self._refusal(node, "contracts the residual stream in a way that is not followed")
        for one in self.contractions[node]:
            if one.weight is not None and self._touched(node):
                self._carries(one.weight)
                self.written.add(one.weight)
        if self._touched(node):
            for source in self._operands(node):
                state = self.states[source]
                if state.kind == "vector":  # a bias
                    self._bias(node, state)
            return STREAM
        return None

    def _bias(self, node: Node, state: _State) -> None:
        assert state.parameter is not None
        if state.shift:
            raise self._refusal(node, "adds a constant to every channel of the residual stream")
        self._carries(state.parameter)
        self.written.add(state.parameter)

    def _read(self, node: Node, one: Contraction, state: _State) -> None:
        assert one.weight is not None
        if state.kind not in ("stream", "weighted"):
            raise self._refusal(node, "reads squares of the residual stream")
        self._carries(one.weight)
        self.reads.setdefault(one.weight, set()).add(state.parameter)
        if state.kind == "weighted":
            assert state.parameter is not None and state.site is not None
            fold = Fold(state.parameter, state.shift, state.site)
            if self.folds.setdefault(state.parameter, fold).shift != state.shift:
                raise self._refusal(node, f"reads two norms that use {state.parameter} in different ways")
            self.sites.setdefault(state.site.node, state.site)
        else:
            self.sites.setdefault(one.value.name, Site(one.value.name))

    def _whole_norm(self, node: Node) -> _State:
        weight = argument(node, "weight")
        source = node.args[0]
        assert isinstance(source, Node)
        if self.states.get(source) != STREAM:
            raise self._refusal(node, "normalises what is no longer the residual stream alone")
        if weight is None:
            return STREAM
        state = self.states[weight]
        return _State("weighted", state.parameter, state.shift, Site(source.name, normalised=False))

    def _sum(self, node: Node, operands: list[Node]) -> _State:
        for source in operands:
            state = self.states[source]
            if state.kind in ("vector", "matrix"):
                self._bias(node, state)
            elif state.kind == "weighted":
                raise self._refusal(
                    node, "adds what a norm yields to the residual stream: its weight is per channel, and no projection "
                    "reads it that could take it over",
                )  # fmt: skip
            elif state != STREAM:
                raise self._refusal(node, "adds to the residual stream what is not rotated with it")
        others = [one for one in node.args[:2] if not (isinstance(one, Node) and one in self.states)]
        if any(isinstance(one, Node) or one != 0 for one in others):
            raise self._refusal(node, "adds the same number to every channel of the residual stream")
        return STREAM

    def _product(self, node: Node, name: str, operands: list[Node]) -> _State:
        left, right = node.args[:2]
        if left is right and self.states[operands[0]] == STREAM and name.startswith("mul"):
            return _State("square")
        if len(operands) == 1:
            source = operands[0]
            if name.startswith("div") and source is not left:
                raise self._refusal(node, "divides by the residual stream")
            state = self.states[source]
            if state.kind not in ("stream", "weighted", "square"):
                raise self._refusal(node, "scales a weight of the residual stream in a way that is not followed")
            return state  # a scalar, or one number for each row
        kinds = {self.states[one].kind: one for one in operands}
        if name.startswith("mul") and set(kinds) == {"stream", "vector"}:
            state = self.states[kinds["vector"]]
            return _State("weighted", state.parameter, state.shift, Site(kinds["stream"].name))
        raise self._refusal(node, "multiplies values of the residual stream channel by channel")

    def _reduction(self, node: Node, name: str, state: _State) -> _State | None:
        if self._touched(node):
            return state  # over rows
        squares = state.kind == "square" and name in ("mean", "sum")
        norm = state == STREAM and name in ("linalg_vector_norm", "norm") and self._order(node) == 2
        if squares or norm:
            return None
        raise self._refusal(node, "takes the channels together in a way that a rotation changes")

    @staticmethod
    def _order(node: Node) -> Any:
        return argument(node, "ord", argument(node, "p", 2))

    def _result(self) -> Rotation:
        tied: Tied | None = None
        reads: dict[str, str] = {}
        for name, norms in self.reads.items():
            folded = {norm for norm in norms if norm is not None}
            if name in self.written and folded and name == self.captured.token_embedding() and len(norms) == 1:
                (norm,) = folded
                tied = Tied(name, self.folds[norm])
                continue
            if len(norms) > 1:
                raise UsageError(
                    f"{name} is read behind norms of different weights, which cannot all be folded into it"
                )
            if folded and (name in self.written or len(self.axes[name]) > 1):
                raise UsageError(f"{name} reads the residual stream behind a norm and writes into it as well")
            reads.update((name, norm) for norm in folded)
        for norm in self.folds:
            if norm in self.axes:
                raise UsageError(f"{norm} is a norm's weight and is used in another way as well")
        last = list(self.sites.values())[-1] if self.sites else None
        return Rotation(dict(self.axes), dict(self.folds), reads, tied, tuple(self.sites.values()), last)
