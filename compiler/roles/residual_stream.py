"""The nodes that carry the residual stream into and out of each layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import RESHAPES, argument, op_name
from minitron.specs.errors import UsageError


@dataclass(frozen=True)
class LayerEnds:
    """The names of the nodes that carry the residual stream into and out of one layer."""

    entry: str
    leave: str


def layer_ends(captured: Captured) -> list[LayerEnds]:
    """Finds the nodes at which the residual stream enters and leaves each layer. Raises UsageError unless each is one
    value."""
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


def skip_layers(graph: Graph, ends: Sequence[LayerEnds], dropped: Collection[int]) -> None:
    """Rewires a graph in place so that the residual stream skips the `dropped` layers; their nodes stay."""
    nodes = {node.name: node for node in graph.nodes}
    # From the last: the entry of a layer may itself be the output of a dropped one, which is replaced after it.
    for layer in sorted(dropped, reverse=True):
        nodes[ends[layer].leave].replace_all_uses_with(nodes[ends[layer].entry])


# Operators whose result is their operand, or zero where that is zero.
HANDED_ON = RESHAPES | {"dropout", "add", "add_"}


def adds_to_its_entry(nodes: Mapping[str, Node], end: LayerEnds) -> bool:
    """Checks whether a layer only adds to the residual stream: then skipping the layer equals setting all its weights
    to zero.

    `nodes` are those of the graph by name.
    """
    entry, left, seen = nodes[end.entry], [nodes[end.leave]], set[Node]()
    while left:
        node = left.pop()
        if node is entry:
            return True
        name = op_name(node)
        if node in seen or name not in HANDED_ON or argument(node, "alpha", 1) != 1:
            continue
        seen.add(node)
        left += node.all_input_nodes if name.startswith("add") else node.all_input_nodes[:1]
    return False


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def first_rescaling_layer(graph: Graph, ends: Sequence[LayerEnds]) -> int | None:
    """The first layer that does more to the residual stream than to add to it; None where every layer only adds."""
    nodes = {node.name: node for node in graph.nodes}
    return next((i for i, end in enumerate(ends) if not adds_to_its_entry(nodes, end)), None)
