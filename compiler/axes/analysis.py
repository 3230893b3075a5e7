"""The dimension analysis: walks the captured graph once and says which axes belong together.

Every node gets one `Dim` per dimension from the rule of its operator (`rules/`). Parameters start with fresh dimensions;
buffers are computed by the model's own code when it is loaded, so they are pinned, and with them whatever they touch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from minitron.compiler.axes.dims import Dims, Pin, Result, size_of
from minitron.compiler.axes.rules import POSITIONS, RULES, experts
from minitron.compiler.axes.table import AttentionSite, AxisTable
from minitron.compiler.axes.tracer import Tracer
from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.names import strip_wrapper

# What these read of a tensor is its shape.
SIZES_ONLY = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int}


def analyse(captured: Captured) -> AxisTable:
    """Runs the analysis over a captured teacher."""
    experts.register()
    tracer = Tracer(captured)
    for node in captured.graph.nodes:
        visit(tracer, node)
    attentions = [AttentionSite(node, heads, value) for node, heads, value in tracer.attentions]
    attentions += _softmax_attention(tracer)
    tracer.space.settle()
    _pin_axes_whose_sort_order_is_observed(tracer)
    return AxisTable(
        tracer.space, tracer.parameters, tracer.nodes, tracer.contractions, attentions, dict(tracer.unknown),
        tracer.meanings, tracer.sorted,
    )  # fmt: skip


def visit(t: Tracer, node: Node) -> None:
    """Gives a node its dimensions, by the rule of its operator."""
    value = node.meta.get("val")
    if node.op == "get_attr":
        if isinstance(value, torch.Tensor):  # or it is a sub-graph, whose operator has no rule
            t.nodes[node] = _attribute(t, node)
    elif node.op == "placeholder":
        t.nodes[node] = [t.space.fresh(size) for size in t.sizes(node)]
        t.ordered += t.dims(node)
    elif node.op == "output":
        t.pin_operands_as_values(node)
    elif node.target is operator.getitem:
        source, position = node.args
        t.nodes[node] = t.nodes[source][position]  # type: ignore[index,assignment]
        if (source, position) in t.meanings:
            t.set_meaning(node, t.meanings[source, position])
    elif node.op == "call_function" and (isinstance(value, torch.Tensor | list | tuple) or value is None):
        rule: Callable[[Tracer, Node], Result] | None = RULES.get(node.target)
        t.nodes[node] = rule(t, node) if rule is not None else t.opaque(node)
        treatment = POSITIONS.get(node.target)
        if treatment is None:
            t.pin_operands_as_values(node)
        elif treatment != "own":
            t.forward_meaning(node, treatment)
        _check(t, node)
    elif node.op == "call_function" and node.target not in SIZES_ONLY:
        t.pin_operands_as_values(node)


def _check(t: Tracer, node: Node) -> None:
    """Checks the sizes of a rule's result: wrong sizes would make all later dimensions wrong."""
    if t.is_single(node):
        got = [size_of(dim) for dim in t.dims(node)]
        assert got == t.sizes(node), f"the rule of {t.place(node)} gives {got} for {t.sizes(node)}"


def _attribute(t: Tracer, node: Node) -> Dims:
    sizes = t.sizes(node)
    name = t.captured.parameter_behind(node)
    if name is None:
        dims = [t.space.fresh(size) for size in sizes]
        for dim in dims:
            t.space.pin(
                dim, "a buffer that the model's code computes when it is loaded", strip_wrapper(str(node.target))
            )
        return dims
    if name not in t.parameters:
        t.parameters[name] = [t.space.fresh(size) for size in sizes]
    return t.parameters[name]


def _softmax_attention(t: Tracer) -> list[AttentionSite]:
    """Finds attention written out: a softmax over the key positions whose result is contracted with the values.

    The number of positions is symbolic, or the graph's fixed length where it has one: [.., queries, keys] then, with one
    more entry where a sink stands beside the keys.
    """
    activations = {c.value: c for c in t.contractions if c.weight is None}
    sites = []
    for node, axis in t.softmaxes:
        sizes = [size_of(dim) for dim in t.dims(node)]
        length = t.captured.length or 0
        square = len(sizes) == 4 and sizes[2].coefficient == length and sizes[3].coefficient in (length, length + 1)
        if not (sizes[axis].symbols or square):
            continue
        reader = node
        while reader not in activations and len(reader.users) == 1:
            reader = next(iter(reader.users))
        if reader in activations:
            product = activations[reader].node
            sites.append(AttentionSite(product, t.dims(node)[1], t.dims(product)[-1]))
    return sites


def _pin_axes_whose_sort_order_is_observed(t: Tracer) -> None:
    """Pins every axis that rows were sorted by, where the order of those rows turned out to matter.

    Such an axis may itself consist of sorted rows, so the search repeats until nothing new is pinned.
    """
    ordered = {leaf for dim in t.ordered for leaf in t.space.leaves(dim)}
    roots = [t.space.find(one.rows) for one in t.sorted]
    left = list(zip(roots, t.sorted, strict=True))
    while held := [
        (root, one)
        for root, one in left
        if root.factors is not None or root.parts is not None or root in ordered or root.pins or roots.count(root) > 1
    ]:
        left = [pair for pair in left if pair not in held]
        for _, one in held:
            for leaf in t.space.leaves(one.by):
                leaf.pins.add(Pin("rows that are sorted by it are read in their order", one.place))
