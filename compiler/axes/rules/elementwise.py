"""Operators that treat every element alike: all operands share their axes, sizes of one broadcast."""

from __future__ import annotations

import torch

from minitron.compiler.axes.dims import Dims, Result
from minitron.compiler.axes.rules.registry import rule
from minitron.compiler.axes.tracer import Tracer

aten = torch.ops.aten

ELEMENTWISE = (
    aten.abs, aten.absolute, aten.add, aten.add_, aten.addcdiv, aten.addcmul, aten.__and__, aten.atan, aten.atan2,
    aten.bitwise_and, aten.bitwise_not, aten.bitwise_or, aten.bitwise_xor, aten.ceil, aten.celu, aten.clamp,
    aten.clamp_, aten.clamp_max, aten.clamp_max_, aten.clamp_min, aten.clamp_min_, aten.copy, aten.copy_, aten.cos,
    aten.cosh, aten.div, aten.div_, aten.elu, aten.eq, aten.erf, aten.exp, aten.exp2, aten.expm1, aten.fill,
    aten.fill_, aten.floor, aten.fmod, aten.ge, aten.gelu, aten.gt, aten.hardsigmoid,
    aten.hardswish, aten.hardtanh, aten.isfinite, aten.isinf, aten.isnan, aten.le, aten.leaky_relu, aten.lerp,
    aten.log, aten.log10, aten.log1p, aten.log2, aten.log_sigmoid, aten.logaddexp, aten.logical_and, aten.logical_not,
    aten.logical_or, aten.logical_xor, aten.logit, aten.lt, aten.masked_fill, aten.masked_fill_, aten.maximum,
    aten.minimum, aten.mish, aten.mul, aten.mul_, aten.nan_to_num, aten.ne, aten.neg, aten.neg_, aten.__or__,
    aten.polar, aten.pow, aten.reciprocal, aten.relu, aten.relu_, aten.relu6, aten.remainder, aten.round, aten.rsqrt,
    aten.rsub, aten.selu, aten.sigmoid, aten.sigmoid_, aten.sign, aten.silu, aten.silu_, aten.sin, aten.sinh,
    aten.softplus, aten.sqrt, aten.square, aten.sub, aten.sub_, aten.tan, aten.tanh, aten.tanh_, aten.threshold,
    aten.trunc, aten.xlogy, aten.__xor__, aten.zero_, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
    aten.where.Scalar, aten.max.other, aten.min.other, aten.real, aten.imag, aten.conj, aten.angle,
)  # fmt: skip

# These read only the dtype or device of their other operands.
COPIES = (
    aten.alias, aten.clone, aten.contiguous, aten.detach, aten.detach_, aten.lift_fresh_copy, aten.to, aten._to_copy,
    aten.type_as,
)  # fmt: skip
LIKE = (aten.empty_like, aten.full_like, aten.ones_like, aten.zeros_like)
# These hold every position as it is, however many there are.
WIDE = (torch.int32, torch.int64, torch.float32, torch.float64)


@rule(*ELEMENTWISE)
def elementwise(t: Tracer, node: torch.fx.Node) -> Result:
    return t.broadcast([t.dims(operand) for operand in t.operands(node)], t.rank(node), t.place(node))


@rule(*COPIES, positions="own")
def copies(t: Tracer, node: torch.fx.Node) -> Dims:
    if node.meta["val"].dtype in WIDE:
        t.forward_meaning(node, "same")
    else:
        t.pin_operands_as_values(node)
    return t.dims(node.args[0])


@rule(aten.dropout)
def nothing(t: Tracer, node: torch.fx.Node) -> Dims:
    return t.dims(node.args[0])


@rule(*LIKE, positions="own")
def like(t: Tracer, node: torch.fx.Node) -> Dims:
    """Takes the sizes of another value: widths are the same axes, but rows are new, because their order is unknown."""
    return [t.fresh_rows(dim) for dim in t.dims(node.args[0])]


@rule(aten._assert_tensor_metadata, positions="own")
def no_values(t: Tracer, node: torch.fx.Node) -> Dims:
    return []


@rule(aten._assert_scalar, aten._assert_async)
def no_result(t: Tracer, node: torch.fx.Node) -> Dims:
    return []
