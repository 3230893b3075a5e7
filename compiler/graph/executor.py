"""Runs a captured graph layer by layer over many batches, with the weights of one layer in memory at a time.

The graph is cut into segments where the layer that nodes belong to changes. A segment's weights are fetched once for all
batches of a block; between segments only the values that later segments read are kept. Memory is a layer's weights, one
batch's activations, and for every batch of the block the residual stream.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from minitron.compiler.graph.names import Fetch, strip_wrapper

Tap = Callable[[torch.Tensor, int], None]
"""Called with a value and the number of its batch."""


Environment = dict[Node, Any]
"""The values of one batch that later segments read."""


@dataclass(frozen=True)
class Settings:
    """The device and the dtype that a graph is run in: `graph_dtype` constants in it become `dtype`."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    graph_dtype: torch.dtype = torch.float32


@dataclass
class _Segment:
    nodes: list[Node] = field(default_factory=list)
    weights: list[Node] = field(default_factory=list)
    live_after: set[Node] = field(default_factory=set)

    def until(self, taps: Mapping[str, Tap]) -> _Segment:
        """The part up to the last node that is tapped, where nothing later is asked for."""
        last = max((i for i, node in enumerate(self.nodes) if node.name in taps), default=-1)
        nodes = self.nodes[: last + 1]
        read = {source for node in nodes for source in node.all_input_nodes}
        return _Segment(nodes, [node for node in self.weights if node in read])


class Executor:
    """A graph ready to be run. `layer_of` gives the number of the layer that a node belongs to, or None."""

    def __init__(
        self,
        graph_module: GraphModule,
        layer_of: Callable[[Node], int | None],
        fetch: Fetch,
        buffers: Mapping[str, torch.Tensor],
        settings: Settings,
    ) -> None:
        self._settings = settings
        self.fetch = fetch
        self._buffers = buffers
        self._shared = _shared_weights(graph_module, layer_of)
        self._segments = _segments(graph_module, layer_of)
        self._output: Node = next(n for n in graph_module.graph.nodes if n.op == "output").args[0]
        while isinstance(self._output, tuple | list):
            (self._output,) = self._output
        self._input = next(n for n in graph_module.graph.nodes if n.op == "placeholder")
        self._arguments = {n: (self._localised(n.args), self._localised(n.kwargs)) for n in graph_module.graph.nodes}
        self._cache: dict[str, torch.Tensor] = {}

    def run(
        self,
        batches: Sequence[torch.Tensor],
        output: Tap | None = None,
        taps: Mapping[str, Tap] | None = None,
        skip: Mapping[Node, Node] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Runs all `batches` [B, S] of token ids through the graph as one block.

        output   called with the logits [B, S, V] of every batch
        taps     node name -> called with that node's value
        skip     last node of a layer -> the node whose value it takes instead; the layer is not run
        advance  called after every batch of every segment
        """
        taps = taps or {}
        environments: list[dict[Node, Any]] = [{self._input: ids.to(self._settings.device)} for ids in batches]
        weights: dict[Node, torch.Tensor] = {}
        with torch.no_grad():
            for segment in self._segments:
                weights.clear()  # before the next are read: those of two layers are never held together
                if output is None and taps and not segment.live_after:
                    segment = segment.until(taps)
                    if not segment.nodes:
                        for number in range(len(batches)):
                            if advance is not None:
                                advance(number)
                        continue
                weights.update((node, self._weight(node)) for node in segment.weights)
                for number, environment in enumerate(environments):
                    environments[number] = self._run_segment(segment, weights, environment, taps, skip or {}, number)
                    if output is not None and self._output in environments[number]:
                        output(environments[number].pop(self._output), number)
                    if advance is not None:
                        advance(number)
        self._cache.clear()

    @property
    def segments(self) -> int:
        return len(self._segments)

    # -- one segment at a time, for two graphs that run side by side --------------------------------------------------

    def start(self, batches: Sequence[torch.Tensor]) -> list[Environment]:
        """What is known of each batch before the first segment."""
        return [{self._input: ids.to(self._settings.device)} for ids in batches]

    def names_in(self, number: int) -> list[str]:
        """The nodes of a segment, in their order."""
        return [node.name for node in self._segments[number].nodes]

    def run_segment(self, number: int, environments: Sequence[Environment]) -> list[Environment]:
        """Runs one segment over all batches: what is known after it."""
        with torch.no_grad():
            segment = self._segments[number]
            weights = {node: self._weight(node) for node in segment.weights}
            return [self._run_segment(segment, weights, one, {}, {}, i) for i, one in enumerate(environments)]

    def values_in(
        self, number: int, environments: Sequence[Environment], names: Collection[str]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yields, for one batch after the other, the values of some nodes of a segment or of what it is given.

        Gradients are off while a batch runs and not between two: several of these iterators may be read in turn.
        """
        found: dict[str, torch.Tensor] = {}
        taps: dict[str, Tap] = {name: lambda value, _, name=name: found.__setitem__(name, value) for name in names}  # type: ignore[misc]
        segment = self._segments[number].until(taps)
        with torch.no_grad():
            weights = {node: self._weight(node) for node in segment.weights}
        for i, environment in enumerate(environments):
            found.clear()
            found.update((node.name, value) for node, value in environment.items() if node.name in names)
            with torch.no_grad():
                self._run_segment(segment, weights, environment, taps, {}, i)
            yield dict(found)

    def _run_segment(
        self,
        segment: _Segment,
        weights: dict[Node, torch.Tensor],
        environment: dict[Node, Any],
        taps: Mapping[str, Tap],
        skip: Mapping[Node, Node],
        number: int,
    ) -> dict[Node, Any]:
        values = {**environment, **weights}
        remaining = _uses(segment)
        skipped = any(node in skip for node in segment.nodes)
        for node in segment.nodes:
            if skipped:
                if node in skip:
                    values[node] = values[skip[node]]
                continue
            args, kwargs = self._arguments[node]
            value = values[node] = _call(node, _fill(args, values), _fill(kwargs, values))
            for source in node.all_input_nodes:
                remaining[source] -= 1
                if not remaining[source] and source not in segment.live_after and source not in weights:
                    values.pop(source, None)
            if node.name in taps:  # once what it was made of is gone: a tap takes memory of its own
                taps[node.name](value, number)
            del value
        keep = segment.live_after | {self._output}
        return {node: value for node, value in values.items() if node in keep}

    def _weight(self, node: Node) -> torch.Tensor:
        name = strip_wrapper(str(node.target))
        if name in self._cache:
            return self._cache[name]
        value = self._buffers[name] if name in self._buffers else self.fetch(name)
        dtype = self._settings.dtype if value.dtype.is_floating_point and name not in self._buffers else None
        value = value.to(device=self._settings.device, dtype=dtype)
        if name in self._shared:
            self._cache[name] = value
        return value

    def _localised(self, arguments: Any) -> Any:
        """Returns arguments with the device and the dtype that the graph is run with."""

        def one(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device(self._settings.device)
            if value is self._settings.graph_dtype:
                return self._settings.dtype
            return value

        return map_aggregate(arguments, one)


def _segments(graph_module: GraphModule, layer_of: Callable[[Node], int | None]) -> list[_Segment]:
    """Nodes that are given first (weights, input) belong to the segment that reads them; dead ones are left out."""
    segments: list[_Segment] = []
    last: int | None = -1
    place: dict[Node, int] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        layer = layer_of(node)
        if layer != last:
            segments.append(_Segment())
            last = layer
        segments[-1].nodes.append(node)
        place[node] = len(segments) - 1
    for node in graph_module.graph.nodes:
        readers = {place[user] for user in node.users if user in place}
        if node.op == "get_attr":
            for reader in readers:
                segments[reader].weights.append(node)
        else:
            born = place.get(node, 0)
            for index in range(born, max(readers, default=born)):
                segments[index].live_after.add(node)
    return segments


def _shared_weights(graph_module: GraphModule, layer_of: Callable[[Node], int | None]) -> Collection[str]:
    """Parameters outside the layers that are read in several places: tied embeddings, kept while a block runs."""
    return {
        strip_wrapper(str(node.target))
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and len({layer_of(user) for user in node.users}) == 1 and len(node.users) > 1
    }


def _uses(segment: _Segment) -> dict[Node, int]:
    count: dict[Node, int] = {}
    for node in segment.nodes:
        for source in node.all_input_nodes:
            count[source] = count.get(source, 0) + 1
    return count


def _fill(arguments: Any, values: Mapping[Node, Any]) -> Any:
    return map_aggregate(arguments, lambda value: values[value] if isinstance(value, Node) else value)


def _call(node: Node, args: Any, kwargs: Any) -> Any:
    if node.target is operator.getitem:
        return args[0][args[1]]
    assert callable(node.target)
    return node.target(*args, **kwargs)
