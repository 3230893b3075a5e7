"""Runs a captured graph layer by layer over many batches, with the weights of one layer in memory at a time.

The graph is cut into segments where the layer that nodes belong to changes (`segments.py`). A segment's weights are
fetched once for all batches of a pass (`weight_feed.py`); between segments only the values that later segments read are
kept, for each batch (`streams.py`), and what follows from the shape of a batch is made once (`by_shape.py`). Memory is
a layer's weights, one batch's activations, and for every batch the residual stream, which may lie in files.

A pass may run several functions side by side: with a `Fork` for each layer, every batch gets, behind each layer, one
more lane, in which that layer is left out. Lanes share everything before they part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from minitron.compiler.graph.by_shape import ByShape, ShapeValues, by_shape, causal_arguments
from minitron.compiler.graph.calls import Settings, call, localised
from minitron.compiler.graph.finite import Watch
from minitron.compiler.graph.graph_module import result_of
from minitron.compiler.graph.names import Fetch
from minitron.compiler.graph.segments import Segment, cut, keep_until, shared_weights
from minitron.compiler.graph.streams import MemoryStreams, Streams, Values, moved
from minitron.compiler.graph.weight_feed import Feeding, WeightFeed

__all__ = ["Environment", "Executor", "Feeding", "Fork", "Output", "Place", "Probes", "Settings", "Tap"]

Tap = Callable[[torch.Tensor, int], None]
"""Called with a value and the number of its batch."""

Output = Callable[[torch.Tensor, int, int], None]
"""Called with the logits [B, S, V], the number of their batch and that of its lane."""

Environment = dict[Node, Any]
"""The values of one batch that later segments read."""


@dataclass(frozen=True)
class Fork:
    """A layer to be left out: its last value is taken to be the one that it was given."""

    entry: str
    leave: str


@dataclass(frozen=True)
class Place:
    """The progress of a pass: all batches are through the segments before `segment`, and `batch` of them through it."""

    segment: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Probes:
    """The observers of a pass; those of values by the name of the node.

    taps    called with a value when it is made
    given   called with a value when it is handed to a later segment
    output  called with the logits; where nobody asks for them, what only they need is not run
    forks   layers to be left out, each in a lane of its own. `taps` and `given` see the lane of the graph itself
    """

    taps: Mapping[str, Tap] = field(default_factory=dict)
    given: Mapping[str, Tap] = field(default_factory=dict)
    output: Output | None = None
    forks: Sequence[Fork] = ()


@dataclass(frozen=True)
class _Step:
    """One segment of a pass. Behind it the lane `born` begins, where there is a `birth`."""

    segment: Segment
    weights: Mapping[Node, torch.Tensor]
    streams: Streams
    probes: Probes
    watch: Watch
    birth: Fork | None
    born: int


class Executor:
    """A graph ready to be run. `layer_of` gives the number of the layer that a node belongs to, or None.

    `feeding` is the memory that weights may take. `fast_attention`: masks that are the causal one are not used as tensors.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        layer_of: Callable[[Node], int | None],
        fetch: Fetch,
        buffers: Mapping[str, torch.Tensor],
        settings: Settings,
        feeding: Feeding = Feeding(),
        *,
        fast_attention: bool = False,
    ) -> None:
        graph = graph_module.graph
        self.settings, self.fetch = settings, fetch
        self._source = (graph_module, layer_of, fetch, buffers)
        shared = () if feeding.apart else shared_weights(graph_module, layer_of)
        self._feed = WeightFeed(fetch, buffers, settings, shared, feeding)
        apart = by_shape(graph, layer_of, buffers)
        self._by_shape = ByShape(apart, settings, self._feed.one, fast_attention=fast_attention)
        self._segments = cut(graph_module, layer_of, set(apart), one_matrix=feeding.apart)
        self._output = result_of(graph)
        self._input = next(n for n in graph.nodes if n.op == "placeholder")
        self._nodes = {node.name: node for node in graph.nodes}
        self._arguments = {n: (localised(n.args, settings), localised(n.kwargs, settings)) for n in graph.nodes}
        self._causal = {
            node: tuple(localised(part, settings) for part in causal_arguments(node))
            for node in graph.nodes
            if fast_attention and getattr(node.target, "_opname", "") == "scaled_dot_product_attention"
        }

    # -- a pass over all batches --------------------------------------------------------------------------------------

    def run(
        self,
        batches: Sequence[torch.Tensor],
        output: Tap | None = None,
        taps: Mapping[str, Tap] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Runs all `batches` [B, S] of token ids through the graph, in memory.

        output   called with the logits [B, S, V] of every batch
        taps     node name -> called with that node's value
        advance  called with the number of every batch of every segment
        """
        logits: Output | None = None if output is None else lambda value, number, _: output(value, number)
        probes = Probes(taps or {}, output=logits)
        for place in self.steps(batches, MemoryStreams(self.settings.device), probes):
            if advance is not None:
                advance(place.batch - 1)

    def steps(
        self, batches: Sequence[torch.Tensor], streams: Streams, probes: Probes, begin: Place = Place()
    ) -> Iterator[Place]:
        """Runs one batch through one segment at each step, and yields how far the pass has come.

        `streams` hold what is known of the batches; at a `begin` other than the start they were restored. Raises
        WorkError where an activation is NaN or infinite, at the latest with the last batch of its segment.
        """
        births = self._births(probes.forks)
        needed = [self._needed(segment, probes) for segment in self._segments]
        lanes = [0, *(number + 1 for number in sorted(births) if number < begin.segment)]
        weights: dict[Node, torch.Tensor] = {}
        try:
            for at in range(begin.segment, len(needed)):
                self._feed.leave(weights)  # before the next are read: two layers' are never computed with together
                first = begin.batch if at == begin.segment else 0
                if needed[at].nodes and first < len(batches):
                    weights.update(self._feed.take(needed[at].weights))
                    self._feed.ask(node for later in needed[at + 1 : at + 2] for node in later.weights)
                step = _Step(needed[at], weights, streams, probes, Watch(self, at), births.get(at), at + 1)
                for number in range(first, len(batches)):
                    if step.segment.nodes:
                        self._step(step, batches[number].to(self.settings.device), number, lanes)
                    if number == len(batches) - 1:
                        step.watch.settle()
                    yield Place(at, number + 1)
                if at in births:
                    lanes.append(at + 1)
        finally:
            self._feed.leave(weights)
            self._feed.end()

    def _step(self, step: _Step, ids: torch.Tensor, number: int, lanes: Sequence[int]) -> None:
        """Takes one batch, in all its lanes, through one segment."""
        for lane in lanes:
            before = self._nodes_of(step.streams.get((number, lane)))
            taps: Mapping[str, Tap] = {}
            if lane == 0:
                taps = step.probes.taps
                for node, value in before.items():
                    if node.name in step.probes.given:
                        step.probes.given[node.name](value, number)
            after = self._through(step.segment, step.weights, before, ids, taps, number)
            step.watch.see(before, after, ids, number)
            if step.probes.output is not None and self._output in after:
                step.probes.output(after.pop(self._output), number, lane)
            step.streams.put((number, lane), {node.name: value for node, value in after.items()})
            if lane == 0 and step.birth is not None:
                step.streams.put((number, step.born), self._parted(step.segment, step.birth, before))

    @property
    def segments(self) -> int:
        return len(self._segments)

    def lanes(self, probes: Probes) -> list[int]:
        """The number of lanes in which each segment runs."""
        births = self._births(probes.forks)
        return [1 + sum(born < number for born in births) for number in range(len(self._segments))]

    def lane_of(self, fork: Fork) -> int:
        """The lane in which the layer of `fork` is left out."""
        return next(iter(self._births([fork]))) + 1

    def _births(self, forks: Sequence[Fork]) -> dict[int, Fork]:
        """The segment behind which each lane begins."""
        found: dict[int, Fork] = {}
        for fork in forks:
            entry, leave = self._nodes[fork.entry], self._nodes[fork.leave]
            keep_until(self._segments, entry, leave)
            found[next(i for i, segment in enumerate(self._segments) if leave in segment.nodes)] = fork
        return found

    def _needed(self, segment: Segment, probes: Probes) -> Segment:
        """The part of a segment that has to be run."""
        if probes.output is None and probes.taps and not segment.live_after:
            return segment.until(probes.taps)
        return segment

    def _parted(self, segment: Segment, fork: Fork, before: Environment) -> dict[str, Any]:
        """The values of a batch behind a layer that is left out."""
        values = {node.name: before[node] for node in segment.live_after if node in before}
        return values | {fork.leave: before[self._nodes[fork.entry]]}

    # -- one segment at a time, for two graphs that run side by side --------------------------------------------------

    def start(self, batches: Sequence[torch.Tensor]) -> list[Environment]:
        """The values of each batch before the first segment."""
        return [{self._input: ids.to(self.settings.device)} for ids in batches]

    def values_of(self, environments: Sequence[Environment]) -> list[Values]:
        """The values of each batch, by the names of their nodes."""
        return [{node.name: value for node, value in one.items()} for one in environments]

    def resume(self, values: Sequence[Values]) -> list[Environment]:
        """Takes up, in another process, the values that `values_of` gave."""
        device = self.settings.device
        return [self._nodes_of({name: moved(value, device) for name, value in one.items()}) for one in values]

    def names_in(self, number: int) -> list[str]:
        """The nodes of a segment, in their order."""
        return [node.name for node in self._segments[number].nodes]

    def run_segment(self, number: int, environments: Sequence[Environment]) -> list[Environment]:
        """Runs one segment over all batches: what is known after it."""
        segment = self._segments[number]
        with torch.no_grad():
            weights = self._feed.take(segment.weights)
            return [self._onwards(segment, weights, one, {}, i) for i, one in enumerate(environments)]

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
            weights = self._feed.take(segment.weights)
        for i, environment in enumerate(environments):
            found.clear()
            found.update((node.name, value) for node, value in environment.items() if node.name in names)
            self._onwards(segment, weights, environment, taps, i)
            yield dict(found)

    def _onwards(
        self,
        segment: Segment,
        weights: dict[Node, torch.Tensor],
        environment: Environment,
        taps: Mapping[str, Tap],
        number: int,
    ) -> Environment:
        ids = environment[self._input]
        known = {node: value for node, value in environment.items() if node is not self._input}
        return {self._input: ids, **self._through(segment, weights, known, ids, taps, number)}

    # -- one batch through one segment --------------------------------------------------------------------------------

    def _through(
        self,
        segment: Segment,
        weights: Mapping[Node, torch.Tensor],
        before: Environment,
        ids: torch.Tensor,
        taps: Mapping[str, Tap],
        number: int,
    ) -> Environment:
        with torch.no_grad():
            given = self._by_shape.of(ids)
            values = {**given.values, self._input: ids, **before, **weights}
            remaining = segment.uses()
            for node in segment.nodes:
                value = values[node] = self.value_of(node, given, values)
                for source in node.all_input_nodes:
                    remaining[source] -= 1
                    if not remaining[source] and source not in segment.live_after and source not in weights:
                        values.pop(source, None)
                if node.name in taps:  # once what it was made of is gone: a tap takes memory of its own
                    taps[node.name](value, number)
                del value
        keep = segment.live_after | {self._output}
        return {node: value for node, value in values.items() if node in keep}

    def value_of(self, node: Node, given: ShapeValues, values: Mapping[Node, Any]) -> Any:
        """Runs one node."""
        return call(node, self._causal[node] if node in given.causal else self._arguments[node], values)

    def _nodes_of(self, values: Mapping[str, Any]) -> Environment:
        return {self._nodes[name]: value for name, value in values.items()}

    # -- what was wrong with a batch ----------------------------------------------------------------------------------

    def trace(self, number: int, before: Environment, ids: torch.Tensor) -> Iterator[tuple[Node, Any, list[Any]]]:
        """Yields every node of a segment with its value and the values that it reads, for one batch."""
        segment = self._segments[number]
        with torch.no_grad():
            given = self._by_shape.of(ids)
            values = {**given.values, self._input: ids, **before, **self._feed.take(segment.weights)}
        for node in segment.nodes:
            with torch.no_grad():
                values[node] = self.value_of(node, given, values)
            yield node, values[node], [values[one] for one in node.all_input_nodes if one in values]

    def in_float32(self) -> Executor:
        """The same graph, run in float32."""
        settings = Settings(self.settings.device, torch.float32, self.settings.graph_dtype)
        return Executor(*self._source, settings)
