"""Scaled dot product attention as one operator."""

from __future__ import annotations

import torch

from minitron.compiler.axes.dims import Result, size_of
from minitron.compiler.axes.rules.registry import rule
from minitron.compiler.axes.tracer import Tracer

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def sdpa(t: Tracer, node: torch.fx.Node) -> Result:
    """q[.., H, S, E], k[.., G, T, E], v[.., G, T, V]; the H query heads are G groups of broadcast repeats."""
    place = t.place(node)
    if any(len(t.dims(node.args[i])) < 3 for i in range(3)):
        return t.opaque(node)
    *query_batch, heads, rows, width = t.dims(node.args[0])
    *key_batch, key_groups, columns, key_width = t.dims(node.args[1])
    *value_batch, value_groups, value_columns, value_width = t.dims(node.args[2])
    batch = t.broadcast([query_batch, key_batch, value_batch], t.rank(node) - 3, place)
    t.space.unify(width, key_width, place)
    t.space.unify(columns, value_columns, place)
    t.space.unify(key_groups, value_groups, place)
    repeats = size_of(heads).divided_by(size_of(key_groups))
    if repeats is None:
        return t.opaque(node)
    t.space.unify(heads, (*key_groups, *t.space.fresh(repeats, broadcast=True)), place)
    if t.arg(node, "scale") is None:
        t.space.pin(width, "the scale of attention is derived from it", place)
    t.note(columns, "softmax", node)
    mask = t.arg(node, 3)
    if mask is not None:
        t.broadcast([[*batch, heads, rows, columns], t.dims(mask)], t.rank(node), place)
    if t.arg(node, 5, False):
        for dim in (rows, columns):
            t.space.pin(dim, "its position decides a causal mask", place)
    if not size_of(heads).symbols:  # or batch and heads are one dimension, and which part is heads is not seen here
        t.attentions.append((node, heads, value_width))
    return [*batch, heads, rows, value_width]
