"""Reads off the graph what lies between the last hidden state and the logits, for a loss that never holds all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import NEUTRAL, argument, is_op, op_name
from minitron.compiler.graph.graph_module import result_of
from minitron.specs.errors import UsageError
from minitron.specs.training_plan import HeadPlan


def find_head(captured: Captured) -> HeadPlan:
    """Raises UsageError where something stands between hidden states and logits that the loss does not know."""
    backbone = str(getattr(captured.model, "base_model_prefix", ""))
    if not isinstance(getattr(captured.model, backbone, None), torch.nn.Module):  # some families name it otherwise
        backbone = captured.layer_path.split(".", 1)[0]
    node: Any = result_of(captured.graph)
    scale, softcap = 1.0, None
    while not is_op(node, {"linear"}):
        if is_op(node, {"slice"}) and argument(node, "dim", 0) in (-1, node.meta["val"].dim() - 1):
            raise UsageError(
                f"{captured.config.model_type}: the head has {node.args[0].meta['val'].shape[-1]} rows and the logits are "
                f"{node.meta['val'].shape[-1]} of them (a padded vocabulary), which the distillation loss does not know"
            )
        if is_op(node, NEUTRAL):
            node = node.args[0]
        elif is_op(node, {"mul", "div"}) and isinstance(node.args[1], int | float):
            factor = float(node.args[1])
            inner = node.args[0]
            if is_op(node, {"mul"}) and is_op(inner, {"tanh"}) and scale == 1.0 and softcap is None:
                quotient = inner.args[0]
                if not (is_op(quotient, {"div"}) and quotient.args[1] == node.args[1]):
                    raise _unknown(captured, inner)
                softcap, node = factor, quotient.args[0]
                continue
            scale *= factor if is_op(node, {"mul"}) else 1.0 / factor
            node = inner
        else:
            raise _unknown(captured, node)
    weight = captured.parameter_behind(node.args[1])
    bias_node = argument(node, "bias")
    bias = captured.parameter_behind(bias_node) if bias_node is not None else None
    module = captured.module_of(node)
    source = node.args[0]
    while not captured.module_of(source).startswith(backbone):
        if is_op(source, NEUTRAL):
            source = source.args[0]
        elif is_op(source, {"mul", "div"}) and isinstance(source.args[1], int | float) and bias is None:
            scale *= float(source.args[1]) if is_op(source, {"mul"}) else 1.0 / float(source.args[1])
            source = source.args[0]
        else:
            raise _unknown(captured, source)
    if weight is None:
        raise _unknown(captured, node)
    return HeadPlan(backbone=backbone, module=module, weight=weight, bias=bias, scale=scale, softcap=softcap)


def _unknown(captured: Captured, node: Any) -> UsageError:
    name = op_name(node) if isinstance(node, Node) else str(node)
    return UsageError(
        f"{captured.config.model_type}: the logits come from the last hidden state through {name}, which the distillation "
        "loss does not know"
    )
