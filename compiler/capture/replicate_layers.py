"""Grows a graph of a few layers to the whole model: each captured layer is copied for every layer that computes the
same.

The first layer of the small graph is the first of the large one; each other layer is a copy of the one that stands for
it, with its own parameters, reading the residual stream from the layer before. Sizes that one layer computes from batch
and sequence are read by all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from minitron.compiler.graph.graph_module import result_of, set_attribute


class CannotRepeatError(Exception):
    """The small graph is not a chain of layers that each hand one value on."""


class _Parts:
    """The nodes of a small graph: attributes, what comes before the layers, each layer, and what comes after."""

    def __init__(self, graph: Graph, layer_of: Callable[[Node], int | None], count: int) -> None:
        self.attributes: list[Node] = []
        self.before: list[Node] = []
        self.layers: list[list[Node]] = [[] for _ in range(count)]
        self.after: list[Node] = []
        for node in graph.nodes:
            if node.op == "get_attr":
                self.attributes.append(node)
                continue
            layer = layer_of(node)
            begun = any(self.layers)
            if layer is not None:
                if self.after or any(self.layers[layer + 1 :]):
                    raise CannotRepeatError("layers do not follow each other")
                self.layers[layer].append(node)
            elif begun and not self.layers[-1]:
                raise CannotRepeatError("something is computed between the layers")
            else:
                (self.after if begun else self.before).append(node)
        if not all(self.layers):
            raise CannotRepeatError("a layer computes nothing")
        self.handed_on = [self._handed_on(number) for number in range(count)]

    def _handed_on(self, number: int) -> Node:
        """The one value that is read after the layer, by the next layer or by what follows the last."""
        members = set(self.layers[number])
        last = number + 1 == len(self.layers)
        readers = set(self.after if last else self.layers[number + 1])
        found = {node for node in members for user in node.users if user not in members and not _is_size(node)}
        if len(found) != 1 or not all(user in members | readers for user in next(iter(found)).users):
            raise CannotRepeatError("a layer hands on something else than one value to the next")
        return found.pop()


def repeat_layers(
    small: GraphModule,
    model: torch.nn.Module,
    layer_of: Callable[[Node], int | None],
    wrapper: str,
    path: str,
    stands_in: Sequence[int],
) -> GraphModule:
    """The graph of a model with `len(stands_in)` layers. Layer i is a copy of the small graph's layer `stands_in[i]`.

    `model` is the whole one on the meta device, whose tensors the attributes are; `path` its list of layers, and
    `wrapper` what names of attributes begin with. CannotRepeatError where the small graph is not a chain of layers.
    """
    assert stands_in[0] == 0 and all(number > 0 for number in stands_in[1:])
    parts = _Parts(small.graph, layer_of, max(stands_in) + 1)
    grown = _Grown(small, model, wrapper, path, stands_in)
    grown.copy_attributes(parts.attributes)
    for node in parts.before:
        grown.outer[node] = grown.copy(node, grown.outer)
    grown.outer[parts.handed_on[-1]] = grown.copy_layers(parts)
    for node in parts.after:
        if node.op == "output":
            grown.graph.output(grown.outer[result_of(small.graph)])
        else:
            grown.outer[node] = grown.copy(node, grown.outer)
    return GraphModule(grown.root, grown.graph)


class _Grown:
    """The large graph while it grows. `outer` maps nodes of the small graph outside the layers to their copies, and `own`, for
    each layer of the large graph, the attributes of the layer that stands for it."""

    def __init__(
        self, small: GraphModule, model: torch.nn.Module, wrapper: str, path: str, stands_in: Sequence[int]
    ) -> None:
        self.graph, self.root = Graph(), torch.nn.Module()
        self.outer: dict[Node, Node] = {}
        self.own: list[dict[Node, Node]] = [{} for _ in stands_in]
        self._small, self._wrapper, self._path, self._stands_in = small, wrapper, path, stands_in
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._tensors: dict[str, torch.Tensor] = dict(tensors)

    def copy_attributes(self, attributes: list[Node]) -> None:
        """Copies the attributes: those of a layer once for each layer that it stands for."""
        prefix = f"{self._wrapper}.{self._path}."
        for run in _runs(attributes, prefix):
            if _number(run[0], prefix) is None:
                self.outer |= {node: self._attribute(node, str(node.target)) for node in run}
                continue
            for layer, stand_in in enumerate(self._stands_in):
                for node in run:
                    if _number(node, prefix) == stand_in:
                        rest = str(node.target)[len(prefix) :].split(".", 1)[1]
                        self.own[layer][node] = self._attribute(node, f"{prefix}{layer}.{rest}")

    def _attribute(self, node: Node, target: str) -> Node:
        name = target.removeprefix(self._wrapper + ".")
        value = self._tensors[name] if name in self._tensors else _constant(self._small, target)
        copied = self.graph.create_node("get_attr", target, name=target.replace(".", "_"))
        copied.meta = dict(node.meta)
        set_attribute(self.root, target, value)
        return copied

    def copy_layers(self, parts: _Parts) -> Node:
        """Copies the layers in a row, each reading the residual stream of the one before; returns that of the last."""
        stream: Node | None = None
        for layer, stand_in in enumerate(self._stands_in):
            values = self.outer | self.own[layer]
            if stand_in:
                assert stream is not None
                values[parts.handed_on[stand_in - 1]] = stream
            for node in parts.layers[stand_in]:
                if node in self.outer:  # a size that an earlier layer has computed
                    continue
                values[node] = self.copy(node, values, (stand_in, layer))
                if _is_size(node):
                    self.outer[node] = values[node]
            stream = values[parts.handed_on[stand_in]]
        assert stream is not None
        return stream

    def copy(self, node: Node, values: Mapping[Node, Node], renumbered: tuple[int, int] | None = None) -> Node:
        """Copies a node that reads `values`; `renumbered` are the numbers of its layer in the small and the large graph."""

        def value(old: Node) -> Node:
            if old not in values:
                raise CannotRepeatError(f"{node.name} reads {old.name}, which belongs to another layer")
            return values[old]

        name = node.name if node.op == "placeholder" else re.sub(r"_\d+$", "", node.name)
        arguments, keywords = map_arg(node.args, value), map_arg(node.kwargs, value)
        copied = self.graph.create_node(node.op, node.target, arguments, keywords, name)
        copied.meta = _meta(node, self._path, renumbered)
        return copied


def _is_size(node: Node) -> bool:
    """Checks whether a node computes a number from batch and sequence sizes: export computes each such number once."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def _number(node: Node, prefix: str) -> int | None:
    """The layer whose tensor a `get_attr` node reads."""
    target = str(node.target)
    return int(target[len(prefix) :].split(".", 1)[0]) if target.startswith(prefix) else None


def _runs(nodes: list[Node], prefix: str) -> list[list[Node]]:
    """Neighbours that all belong to layers, or all do not."""
    runs: list[list[Node]] = []
    for node in nodes:
        inside = _number(node, prefix) is not None
        if runs and (_number(runs[-1][0], prefix) is not None) == inside:
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs


def _constant(small: GraphModule, target: str) -> torch.Tensor:
    """Returns a tensor that export made from a constant in the code, and that is not the model's."""
    path, _, name = target.rpartition(".")
    value = getattr(small.get_submodule(path), name)
    if not isinstance(value, torch.Tensor):
        raise CannotRepeatError(f"{target} is a sub-graph")
    return value


def _meta(node: Node, path: str, renumbered: tuple[int, int] | None) -> dict[str, Any]:
    """Returns the metadata of a node, with its module paths moved to the layer of the copy."""
    meta = {key: value for key, value in node.meta.items() if key in ("val", "nn_module_stack")}
    if renumbered is None or "nn_module_stack" not in meta:
        return meta
    old, new = (f"{path}.{number}" for number in renumbered)

    def moved(text: str) -> str:
        return re.sub(rf"(?<![\w]){re.escape(old)}(?!\w)", new, text)

    meta["nn_module_stack"] = {
        moved(key): (moved(str(where)), *rest) for key, (where, *rest) in meta["nn_module_stack"].items()
    }
    return meta
