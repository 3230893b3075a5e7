"""The values of a graph that follow from the sizes of its input alone, made once for all batches of one shape.

Outside the layers these are masks, position numbers and rotary tables. A mask that scaled dot-product attention reads
is looked at as well: where it is the causal one, the call gets `is_causal` in its place, which is what torch has its
fast kernels for, and no batch holds the mask.

    rewritten    a call of aten.scaled_dot_product_attention whose mask is made here, is square and holds
                 True (or zero) up to the diagonal and False (or the lowest number) beyond it
    left alone   every other call. A sliding window that is longer than the sequence is the causal mask

The condition is checked on the mask itself, for each shape: nothing is inferred from how the mask was made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from minitron.compiler.graph.aten import argument, op_name
from minitron.compiler.graph.calls import Settings, call, localised
from minitron.compiler.graph.names import strip_wrapper

# Operators that read only the shape of their input.
SHAPE_ONLY = {"zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "full_like", "empty_like", "new_empty"}
_ROWS = 1024  # of a mask that are looked at in one piece


def by_shape(graph: Graph, layer_of: Callable[[Node], int | None], buffers: Collection[str]) -> list[Node]:
    """Finds the nodes outside the layers whose values follow from the sizes of the input, constants and buffers.

    None at all where an operator writes in place into a value of this kind: then each batch needs its own.
    """
    (given,) = (node for node in graph.nodes if node.op == "placeholder")
    known = {node for node in graph.nodes if node.op == "get_attr" and strip_wrapper(str(node.target)) in buffers}
    outside, found = set(known), list[Node]()
    for node in graph.nodes:
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        sources = set(node.all_input_nodes)
        sized = sources == {given} and (op_name(node) == "sym_size" or op_name(node) in SHAPE_ONLY)
        if not sized and not sources <= known:
            continue
        known.add(node)  # one that a layer makes too: its memory may be that of a value from outside
        if layer_of(node) is None and (sized or sources <= outside):
            outside.add(node)
            found.append(node)
    if any(written in known for node in graph.nodes for written in _written(node)):
        return []
    return found


def _written(node: Node) -> list[Node]:
    """The arguments that an operator writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    names = [one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    return [value for name in names if isinstance(value := argument(node, name), Node)]


@dataclass(frozen=True)
class ShapeValues:
    """The values that all batches of one shape share. `causal` are the attention calls that need no mask."""

    values: dict[Node, Any]
    causal: frozenset[Node]


class ByShape:
    """Makes the values of each shape once. `fast_attention`: causal masks are replaced."""

    def __init__(
        self, nodes: list[Node], settings: Settings, buffer: Callable[[Node], torch.Tensor], *, fast_attention: bool
    ):
        self.nodes = nodes
        self._settings, self._buffer, self._fast = settings, buffer, fast_attention
        self._made: dict[tuple[int, ...], ShapeValues] = {}

    def of(self, ids: torch.Tensor) -> ShapeValues:
        """The values for the shape of `ids` [B, S], which are on the device."""
        shape = tuple(ids.shape)
        if shape not in self._made:
            self._made[shape] = self._make(ids)
        return self._made[shape]

    def _make(self, ids: torch.Tensor) -> ShapeValues:
        values: dict[Node, Any] = {}
        inside, done = set(self.nodes), set[Node]()
        with torch.no_grad():
            for node in self.nodes:
                for source in node.all_input_nodes:
                    if source.op == "placeholder":
                        values[source] = ids
                    elif source.op == "get_attr":
                        values[source] = self._buffer(source)
                arguments = localised(node.args, self._settings), localised(node.kwargs, self._settings)
                values[node] = call(node, arguments, values)
                done.add(node)
                for source in node.all_input_nodes:
                    if done.issuperset(source.users):
                        values.pop(source, None)
            causal: set[Node] = set()
            kept: dict[Node, Any] = {}
            for node in self.nodes:
                readers = [user for user in node.users if user not in inside]
                if not readers:
                    continue
                masked = {user for user in readers if self._fast and _attends_with(user, node)}
                if masked and is_causal(values[node]):
                    causal |= masked
                    if masked == set(readers):
                        continue
                kept[node] = values[node]
        return ShapeValues(kept, frozenset(causal))


def _attends_with(node: Node, mask: Node) -> bool:
    return (
        op_name(node) == "scaled_dot_product_attention"
        and argument(node, "attn_mask") is mask
        and not argument(node, "is_causal", False)
        and not argument(node, "dropout_p", 0.0)
        and all(argument(node, name) is not mask for name in ("query", "key", "value"))
    )


def is_causal(mask: Any) -> bool:
    """Checks whether a mask [.., S, S] lets each position see itself and those before it, and no other."""
    if not isinstance(mask, torch.Tensor) or mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    rows = mask.shape[-1]
    # Dimensions that were expanded hold the same numbers over and over.
    for dim, stride in enumerate(mask.stride()[:-2]):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    for start in range(0, rows, _ROWS):
        part = mask[..., start : start + _ROWS, :]
        wanted = torch.ones(part.shape[-2:], dtype=torch.bool, device=mask.device).tril(start)
        if part.dtype == torch.bool:
            good = (part == wanted).all()
        else:
            low = torch.finfo(part.dtype).min
            good = torch.where(wanted, part == 0, part <= low).all()
        if not bool(good):
            return False
    return True


def causal_arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an attention call with `is_causal` in the place of its mask."""
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    rest = {name: argument(node, name) for name in ("scale", "enable_gqa") if argument(node, name) is not None}
    return (query, key, value, None, 0.0, True), rest
