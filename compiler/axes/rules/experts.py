"""Grouped matrix products: the rows of each expert are multiplied with that expert's matrix."""

from __future__ import annotations

import torch

from minitron.compiler.axes.dims import Result
from minitron.compiler.axes.index_meaning import Offsets
from minitron.compiler.axes.rules.registry import POSITIONS, RULES
from minitron.compiler.axes.tracer import Tracer


def grouped_mm(t: Tracer, node: torch.fx.Node) -> Result:
    """y[n, m] = x[n, k] W[e(n), k, m], where `offs[e]` says where the rows of each expert end.

    Nothing is pinned where the rows are sorted by the same positions that `offs` counts: with any numbering of the
    experts, each row meets its own expert's matrix.
    """
    bias, offsets = t.arg(node, 3), t.arg(node, 2)
    if len(t.dims(node.args[0])) != 2 or len(t.dims(node.args[1])) != 3 or isinstance(bias, torch.fx.Node):
        return t.opaque(node)
    rows, read = t.dims(node.args[0])
    experts, contracted, written = t.dims(node.args[1])
    t.contract(node, node.args[0], node.args[1], read, contracted)
    t.space.unify(experts, t.dims(offsets)[0], t.place(node))
    ends = t.meanings.get(offsets)
    if not isinstance(ends, Offsets) or not t.is_sorted_by(rows, ends.source):
        t.pin_operands_as_values(node)
        t.space.pin(rows, "its order decides which expert takes it", t.place(node))
        t.space.pin(experts, "rows are given to its indices by numbers", t.place(node))
    return [rows, written]


def grouped_mm_targets() -> list[object]:
    """The operator of torch and, once transformers has registered it, the one that export records instead."""
    targets: list[object] = [torch.ops.aten._grouped_mm.default]
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        targets.append(torch.ops.transformers.grouped_mm_fallback.default)
    return targets


def register() -> None:
    """Registers the rule. Call this after a model is captured: only then are the custom operators known."""
    for target in grouped_mm_targets():
        RULES[target] = grouped_mm
        POSITIONS[target] = "own"
