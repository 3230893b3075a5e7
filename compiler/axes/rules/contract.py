"""Operators that contract an axis of one operand with an axis of another."""

from __future__ import annotations

import torch

from minitron.compiler.axes.dims import Dim, Dims, Result, size_of
from minitron.compiler.axes.rules.registry import rule
from minitron.compiler.axes.tracer import Tracer

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
    *left, rows, read = t.dims(node.args[1])
    *right, contracted, columns = t.dims(node.args[2])
    t.contract(node, node.args[1], node.args[2], read, contracted)
    batch = t.broadcast([left, right], len(right), t.place(node))
    return t.broadcast([t.dims(node.args[0]), [*batch, rows, columns]], t.rank(node), t.place(node))


@rule(aten.einsum.default)
def einsum(t: Tracer, node: torch.fx.Node) -> Result:
    """Gives every letter one axis; without an arrow the result has the letters that occur once, sorted. No ellipsis."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(t.arg(node, 1))
    if "." in equation:
        return t.opaque(node)
    inputs, arrow, output = equation.partition("->")
    if not arrow:
        output = "".join(letter for letter in sorted(set(inputs) - {","}) if inputs.count(letter) == 1)
    letters: dict[str, Dim] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):
        for letter, dim in zip(term, t.dims(operand), strict=True):
            if letter in letters and letters[letter] and dim:
                t.space.unify(letters[letter], dim, t.place(node))
            letters[letter] = letters.get(letter) or dim
    return [letters[letter] for letter in output]


@rule(aten.conv1d.default)
def conv1d(t: Tracer, node: torch.fx.Node) -> Result:
    """y[.., o, L'] = sum over i, k of x[.., i, L + k] W[o, i, k] + b[o], or with a filter of its own for every channel.

    Groups of several channels are not looked into. The length is the sequence; what is left of it is another one.
    """
    *batch, channels, length = t.dims(node.args[0])
    written, contracted, kernel = t.dims(node.args[1])
    place, groups = t.place(node), t.arg(node, 6, 1)
    if groups == 1:
        t.space.unify(channels, contracted, place)
    elif not contracted and size_of(channels) == size_of(written):
        t.space.unify(channels, written, place)
    else:
        return t.opaque(node)
    bias = t.arg(node, 2)
    if bias is not None:
        t.space.unify(written, t.dims(bias)[0], place)
    t.space.pin(kernel, "the offsets of a filter", place)
    return [*batch, written, t.untracked(length, t.sizes(node)[-1], "filtered along its order", place)]
