"""Cuts a graph into segments, which run one after the other over all batches: one for each layer, and what lies between.

Values that follow from the sizes of the input alone (masks, rotary tables) belong to no segment: `by_shape.py` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from minitron.compiler.graph.names import strip_wrapper


@dataclass
class Segment:
    """Neighbouring nodes, the parameters and buffers that they read, and which of the values so far later segments read."""

    nodes: list[Node] = field(default_factory=list)
    weights: list[Node] = field(default_factory=list)
    live_after: set[Node] = field(default_factory=set)

    def until(self, names: Collection[str] | Mapping[str, Any]) -> Segment:
        """The part up to the last node of these names, where nothing later is asked for."""
        last = max((i for i, node in enumerate(self.nodes) if node.name in names), default=-1)
        nodes = self.nodes[: last + 1]
        read = {source for node in nodes for source in node.all_input_nodes}
        return Segment(nodes, [node for node in self.weights if node in read])

    def uses(self) -> dict[Node, int]:
        """The number of times that each value is read here."""
        count: dict[Node, int] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                count[source] = count.get(source, 0) + 1
        return count


def cut(
    graph_module: GraphModule,
    layer_of: Callable[[Node], int | None],
    apart: Collection[Node],
    *,
    one_matrix: bool = False,
) -> list[Segment]:
    """Cuts where the layer that nodes belong to changes, and with `one_matrix` before each further matrix. Weights belong to
    the segments that read them; the input and the nodes that are `apart` are there everywhere; dead nodes are left out."""
    segments: list[Segment] = []
    last: int | None = -1
    place: dict[Node, int] = {}
    matrices: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node in apart:
            continue
        layer, read = layer_of(node), {one for one in node.all_input_nodes if _is_matrix(one)}
        if layer != last or (one_matrix and matrices and read - matrices):
            segments.append(Segment())
            last, matrices = layer, set()
        matrices |= read
        segments[-1].nodes.append(node)
        place[node] = len(segments) - 1
    for node in graph_module.graph.nodes:
        readers = {place[user] for user in node.users if user in place}
        if node.op == "get_attr":
            for reader in readers:
                segments[reader].weights.append(node)
        elif node in place:
            for index in range(place[node], max(readers, default=place[node])):
                segments[index].live_after.add(node)
    return segments


def _is_matrix(node: Node) -> bool:
    """Checks whether a node is a weight of two dimensions or more."""
    return node.op == "get_attr" and getattr(node.meta.get("val"), "ndim", 0) > 1


def keep_until(segments: list[Segment], node: Node, last: Node) -> None:
    """Keeps a value up to the segment of `last`."""
    born, end = (next((i for i, one in enumerate(segments) if which in one.nodes), 0) for which in (node, last))
    for index in range(born, end):
        segments[index].live_after.add(node)


def shared_weights(graph_module: GraphModule, layer_of: Callable[[Node], int | None]) -> Collection[str]:
    """Parameters outside the layers that are read in several places: tied embeddings, kept while a pass runs."""
    return {
        strip_wrapper(str(node.target))
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and len({layer_of(user) for user in node.users}) == 1 and len(node.users) > 1
    }
