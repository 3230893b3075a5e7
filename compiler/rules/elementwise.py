"""Operators that treat every element alike: all operands share their axes, sizes of one broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minitron.compiler.rules.registry import Dims, Result, rule

if TYPE_CHECKING:
    from minitron.compiler.axes import Tracer

aten = torch.ops.aten

ELEMENTWISE = (
    aten.abs, aten.add, aten.add_, aten.addcmul, aten.alias, aten.bitwise_and, aten.bitwise_not, aten.bitwise_or,
    aten.clamp, aten.clamp_min, aten.clamp_max, aten.clone, aten.contiguous, aten.cos, aten.detach, aten.div, aten.div_,
    aten.dropout, aten.elu, aten.eq, aten.erf, aten.exp, aten.fill, aten.floor, aten.floor_divide, aten.ge, aten.gelu,
    aten.gt, aten.hardswish, aten.hardtanh, aten.leaky_relu, aten.le, aten.lift_fresh_copy, aten.log, aten.log1p,
    aten.logical_and, aten.logical_not, aten.logical_or, aten.lt, aten.masked_fill, aten.masked_fill_, aten.maximum,
    aten.minimum, aten.mish, aten.mul, aten.mul_, aten.ne, aten.neg, aten.pow, aten.reciprocal, aten.relu, aten.relu6,
    aten.remainder, aten.rsqrt, aten.rsub, aten.sigmoid, aten.sign, aten.silu, aten.sin, aten.softplus, aten.sqrt,
    aten.square, aten.sub, aten.sub_, aten.tanh, aten.to, aten._to_copy, aten.type_as, aten.where, aten.xlogy,
    aten.__and__, aten.__or__, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like,
)  # fmt: skip


@rule(*ELEMENTWISE)
def elementwise(t: Tracer, node: torch.fx.Node) -> Result:
    return t.broadcast([t.dims(operand) for operand in t.operands(node)], t.rank(node), t.place(node))


@rule(aten._assert_tensor_metadata)
def no_result(t: Tracer, node: torch.fx.Node) -> Dims:
    return []
