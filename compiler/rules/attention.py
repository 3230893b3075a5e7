"""Scaled dot product attention as one operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minitron.compiler.dims import size_of
from minitron.compiler.rules.registry import Result, rule

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def sdpa(t: Tracer, node: torch.fx.Node) -> Result:
    """q[B, H, S, E], k[B, G, T, E], v[B, G, T, V]; with enable_gqa the H query heads are G groups of broadcast repeats."""
    place = t.place(node)
    batch, heads, rows, width = t.dims(node.args[0])
    _, key_groups, columns, key_width = t.dims(node.args[1])
    _, value_groups, value_columns, value_width = t.dims(node.args[2])
    t.space.unify(width, key_width, place)
    t.space.unify(columns, value_columns, place)
    t.space.unify(key_groups, value_groups, place)
    repeats = size_of(heads).divided_by(size_of(key_groups))
    if repeats is None:
        return t.opaque(node)
    t.space.unify(heads, (*key_groups, *t.space.fresh(repeats, broadcast=True)), place)
    if t.arg(node, 6, None, "scale") is None:
        t.space.pin(width, "the scale of attention is derived from it", place)
    mask = t.arg(node, 3)
    if mask is not None:
        t.broadcast([[batch, heads, rows, columns], t.dims(mask)], 4, place)
    t.attentions.append((node, heads, value_width))
    return [batch, heads, rows, value_width]
