"""Operators that contract an axis of one operand with an axis of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minitron.compiler.dims import Dim
from minitron.compiler.rules.registry import Dims, Result, rule

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(t: Tracer, node: torch.fx.Node) -> Dims:
    """y[.., o] = x[.., i] W[o, i] + b[o]"""
    *front, read = t.dims(node.args[0])
    written, contracted = t.dims(node.args[1])
    t.contract(node, node.args[0], node.args[1], read, contracted)
    bias = t.arg(node, 2)
    if bias is not None:
        t.space.unify(written, t.dims(bias)[0], t.place(node))
    return [*front, written]


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(t: Tracer, node: torch.fx.Node) -> Dims:
    """y[.., n, m] = a[.., n, k] b[.., k, m]; a vector has no n, or no m."""
    a, b = t.dims(node.args[0]), t.dims(node.args[1])
    rows: Dims = [a[-2]] if len(a) > 1 else []
    columns: Dims = [b[-1]] if len(b) > 1 else []
    t.contract(node, node.args[0], node.args[1], a[-1], b[-2] if len(b) > 1 else b[-1])
    batch = t.broadcast([a[:-2], b[:-2]], max(len(a), len(b), 2) - 2, t.place(node))
    return [*batch, *rows, *columns]


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(t: Tracer, node: torch.fx.Node) -> Dims:
    """y[.., n, m] = c[.., n, m] + a[.., n, k] b[.., k, m]"""
    *_, rows, read = t.dims(node.args[1])
    *batch, contracted, columns = t.dims(node.args[2])
    t.contract(node, node.args[1], node.args[2], read, contracted)
    return t.broadcast([t.dims(node.args[0]), [*batch, rows, columns]], t.rank(node), t.place(node))


@rule(aten.einsum.default)
def einsum(t: Tracer, node: torch.fx.Node) -> Result:
    """Every letter is one axis. An ellipsis is not looked into."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(t.arg(node, 1))
    if "." in equation or "->" not in equation:
        return t.opaque(node)
    inputs, output = equation.split("->")
    letters: dict[str, Dim] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):
        for letter, dim in zip(term, t.dims(operand), strict=True):
            if letter in letters and letters[letter] and dim:
                t.space.unify(letters[letter], dim, t.place(node))
            letters[letter] = letters.get(letter) or dim
    return [letters[letter] for letter in output]
