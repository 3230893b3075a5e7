"""Pass: drop whole layers.

1. Every use of a dropped layer's output becomes a use of its input: the residual stream skips the layer.
2. Nodes that only the dropped layer used are removed, its parameters with them.
3. The remaining layers are renumbered from 0, as the narrowed model will name them.

A layer must read one value of the residual stream and yield one, else it is refused: `layer_ends` says so before any
pass.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import MAY_SHARE
from minitron.compiler.graph.graph_module import attribute
from minitron.compiler.graph.names import WRAPPER
from minitron.compiler.rewrite.passes import Pass
from minitron.compiler.roles.residual_stream import LayerEnds, skip_layers


def drop_layers(captured: Captured, ends: Sequence[LayerEnds], kept: Sequence[int]) -> Pass:
    """The pass that leaves only the layers `kept` (teacher's numbers, ascending)."""
    numbers = {old: new for new, old in enumerate(kept)}
    prefix = f"{WRAPPER}.{captured.layer_path}."

    def run(graph_module: GraphModule) -> None:
        dropped = [i for i in range(captured.layer_count) if i not in numbers]
        if not dropped:
            return
        skip_layers(graph_module.graph, ends, dropped)
        _remove_dead(graph_module)
        for node in graph_module.graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and target.startswith(prefix):
                number, rest = target[len(prefix) :].split(".", 1)
                node.target = f"{prefix}{numbers[int(number)]}.{rest}"
        _move_modules(graph_module, prefix.rstrip("."), kept)

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
    """Removes dead nodes. An operator that writes into a tensor stays while any holder of that tensor is needed."""
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
