"""Pass: drop whole layers.

1. Every use of what a dropped layer yields becomes a use of what it was given: the residual stream passes it by.
2. Nodes that only the dropped layer used are removed, its parameters with them.
3. The layers that are left are numbered anew from 0, as the narrowed model will name them.

A layer must read one value of the residual stream and yield one, else it is refused: `layer_ends` says so before any pass.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import MAY_SHARE
from minitron.compiler.graph.graph_module import attribute
from minitron.compiler.graph.names import WRAPPER
from minitron.compiler.rewrite.passes import Pass, PassResult
from minitron.specs.errors import UsageError


@dataclass(frozen=True)
class LayerEnds:
    """The names of the nodes that carry the residual stream into and out of one layer."""

    entry: str
    leave: str


def layer_ends(captured: Captured) -> list[LayerEnds]:
    """Where the residual stream enters and leaves each layer. UsageError where that is not one value each."""
    inside: dict[int, list[Node]] = {i: [] for i in range(captured.layer_count)}
    for node in captured.graph.nodes:
        layer = captured.layer_of(node)
        if node.op == "call_function" and layer is not None:
            inside[layer].append(node)
    ends: list[LayerEnds] = []
    for number, nodes in inside.items():
        members = set(nodes)
        leaving = [n for n in nodes if any(user not in members for user in n.users) and _is_tensor(n)]
        if len(leaving) != 1:
            raise UsageError(f"layer {number} yields {len(leaving)} values, not the residual stream alone")
        shape = leaving[0].meta["val"].shape
        wanted = ends[-1].leave if ends else None
        entering = {
            source
            for n in nodes
            for source in n.all_input_nodes
            if source not in members
            and source.op == "call_function"
            and _is_tensor(source)
            and source.meta["val"].shape == shape
            and source.meta["val"].dtype.is_floating_point
            and (wanted is None or source.name == wanted)
        }
        if len(entering) != 1:
            raise UsageError(f"layer {number} reads {len(entering)} values of the residual stream, not one")
        ends.append(LayerEnds(entering.pop().name, leaving[0].name))
    return ends


# What they yield is what they are given, or zero where that is zero.
HANDED_ON = {*MAY_SHARE, "dropout", "clone", "_to_copy", "alias", "detach", "view", "add", "add_"}


def adds_to_its_entry(nodes: Mapping[str, Node], end: LayerEnds) -> bool:
    """Whether a layer only adds to the residual stream: then passing it by is the same as having all its weights at zero.

    `nodes` are those of the graph by name.
    """
    entry, left, seen = nodes[end.entry], [nodes[end.leave]], set[Node]()
    while left:
        node = left.pop()
        if node is entry:
            return True
        name = getattr(node.target, "_opname", "")
        if node in seen or name not in HANDED_ON or node.kwargs.get("alpha", 1) != 1:
            continue
        seen.add(node)
        left += node.all_input_nodes if name.startswith("add") else node.all_input_nodes[:1]
    return False


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def drop_layers(captured: Captured, ends: Sequence[LayerEnds], kept: Sequence[int]) -> Pass:
    """The pass that leaves only the layers `kept` (teacher's numbers, ascending)."""
    numbers = {old: new for new, old in enumerate(kept)}
    prefix = f"{WRAPPER}.{captured.layer_path}."

    def run(graph_module: GraphModule) -> PassResult:
        nodes = {node.name: node for node in graph_module.graph.nodes}
        dropped = [i for i in range(captured.layer_count) if i not in numbers]
        if not dropped:
            return PassResult(graph_module, False, "all layers kept")
        # From the last: what a layer is given may itself come from a dropped one, whose turn is then still to come.
        for layer in reversed(dropped):
            nodes[ends[layer].leave].replace_all_uses_with(nodes[ends[layer].entry])
        _remove_dead(graph_module)
        for node in graph_module.graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and target.startswith(prefix):
                number, rest = target[len(prefix) :].split(".", 1)
                node.target = f"{prefix}{numbers[int(number)]}.{rest}"
        _move_modules(graph_module, prefix.rstrip("."), kept)
        return PassResult(graph_module, True, f"dropped layers {dropped}")

    def ensures(graph_module: GraphModule) -> None:
        left = set()
        for node in graph_module.graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(prefix):
                left.add(int(str(node.target)[len(prefix) :].split(".", 1)[0]))
                assert max(left) < len(kept), f"{node.target} belongs to a layer that is gone"
                assert attribute(graph_module, str(node.target)) is not None
        assert len(left) == len(kept), f"{len(left)} layers are left, not {len(kept)}"

    return Pass("drop_layers", run, ensures)


def _remove_dead(graph_module: GraphModule) -> None:
    """Removes what no output needs. An operator that writes into a tensor is needed where anything that holds it is."""
    nodes = list(graph_module.graph.nodes)
    needed = {node for node in nodes if node.op in ("placeholder", "output")}
    storage = {node: _storage(node) for node in nodes}
    writes = [node for node in nodes if _writes(node)]
    pending = list(needed)
    while pending:
        while pending:
            new = set(pending.pop().all_input_nodes) - needed
            needed |= new
            pending += new
        held = {storage[node] for node in needed}
        pending = [node for node in writes if node not in needed and storage[node] in held]
        needed |= set(pending)
    for node in reversed(nodes):
        if node not in needed:
            graph_module.graph.erase_node(node)


def _writes(node: Node) -> bool:
    return node.op == "call_function" and bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _storage(node: Node) -> Node:
    """The node whose storage an operator's result may share: that of its first operand, where its schema says so."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        shares = node.target is operator.getitem or (
            schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None
        )
        may = schema is not None and schema.name.split("::")[-1] in MAY_SHARE
        if not (shares or may) or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return node


def _move_modules(graph_module: GraphModule, path: str, kept: Sequence[int]) -> None:
    """The sub-modules that hold the layers' parameters, renumbered."""
    holder = graph_module.get_submodule(path)
    layers = dict(holder.named_children())
    for name in layers:
        delattr(holder, name)
    for new, old in enumerate(kept):
        holder.add_module(str(new), layers[str(old)])
