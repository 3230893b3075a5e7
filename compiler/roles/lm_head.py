"""Reads off the graph what lies between the last hidden state and the logits, for a loss that never holds all logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.fx import Node

from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.models import quiet
from minitron.compiler.graph.aten import NEUTRAL, argument, is_op, op_name
from minitron.compiler.graph.graph_module import result_of
from minitron.specs.errors import UsageError, first_line
from minitron.specs.training_plan import HeadPlan


def find_head(captured: Captured) -> HeadPlan:
    """Returns the head of a model. UsageError where something stands between hidden states and logits that the loss does
    not know.
    """
    backbone = str(getattr(captured.model, "base_model_prefix", ""))
    if not isinstance(getattr(captured.model, backbone, None), torch.nn.Module):  # some families name it otherwise
        backbone = captured.layer_path.split(".", 1)[0]
    linear, scale, softcap = _linear_before(captured, result_of(captured.graph))
    weight, bias_node = captured.parameter_behind(linear.args[1]), argument(linear, "bias")
    bias = captured.parameter_behind(bias_node) if bias_node is not None else None
    source = linear.args[0]
    while not captured.module_of(source).startswith(backbone):
        factor = 1.0 if is_op(source, NEUTRAL) else _factor(source) if bias is None else None
        if factor is None:
            raise _unknown(captured, source)
        scale, source = scale * factor, source.args[0]
    if weight is None:
        raise _unknown(captured, linear)
    return HeadPlan(
        backbone=backbone, module=captured.module_of(linear), weight=weight, bias=bias, scale=scale, softcap=softcap
    )


def check_backbone(captured: Captured, backbone: str) -> None:
    """Checks that the backbone yields its last hidden states by name, as every model of transformers does: the loss reads
    them there. UsageError where a class of somebody else's does not.
    """
    if type(captured.model).__module__.startswith("transformers."):
        return
    module = captured.model.get_submodule(backbone)
    call = {"input_ids": torch.zeros(1, captured.length or 3, dtype=torch.long, device="meta"), "use_cache": False}
    try:
        inspect.signature(module.forward).bind(**call)
    except TypeError as error:
        reason = f"cannot be called with input_ids and use_cache ({first_line(error)})"
    else:
        try:
            with quiet(), torch.no_grad():
                found = module(**call)
        except Exception:  # on the meta device code may want to see data
            return
        if isinstance(getattr(found, "last_hidden_state", None), torch.Tensor):
            return
        reason = f"yields a {type(found).__name__} without `last_hidden_state`"
    raise UsageError(
        f"the backbone of {captured.config.model_type} ({type(module).__name__}, `{backbone}`) {reason}: the distillation loss "
        "could not read its hidden states; return a BaseModelOutputWithPast of transformers"
    )


def _linear_before(captured: Captured, node: Any) -> tuple[Any, float, float | None]:
    """Walks back from the logits to the product with the head's matrix. Returns it, with the factor and the soft-cap behind
    it.
    """
    scale, softcap = 1.0, None
    while not is_op(node, {"linear"}):
        if is_op(node, {"slice"}) and argument(node, "dim", 0) in (-1, node.meta["val"].dim() - 1):
            raise UsageError(
                f"{captured.config.model_type}: the head has {node.args[0].meta['val'].shape[-1]} rows and the logits are "
                f"{node.meta['val'].shape[-1]} of them (a padded vocabulary), which the distillation loss does not know"
            )
        if is_op(node, NEUTRAL):
            node = node.args[0]
        elif scale == 1.0 and softcap is None and (capped := _capped(node)) is not None:
            softcap, node = float(node.args[1]), capped
        elif (factor := _factor(node)) is not None:
            scale, node = scale * factor, node.args[0]
        else:
            raise _unknown(captured, node)
    return node, scale, softcap


def _factor(node: Any) -> float | None:
    """Returns the factor of a product or a quotient with a number; None for any other operator."""
    if not (is_op(node, {"mul", "div"}) and isinstance(node.args[1], int | float)):
        return None
    return float(node.args[1]) if is_op(node, {"mul"}) else 1.0 / float(node.args[1])


def _capped(node: Any) -> Any:
    """Returns z of c * tanh(z / c), a soft-cap; None for any other operator."""
    if not (is_op(node, {"mul"}) and isinstance(node.args[1], int | float) and is_op(node.args[0], {"tanh"})):
        return None
    quotient = node.args[0].args[0]
    return quotient.args[0] if is_op(quotient, {"div"}) and quotient.args[1] == node.args[1] else None


def _unknown(captured: Captured, node: Any) -> UsageError:
    name = op_name(node) if isinstance(node, Node) else str(node)
    return UsageError(
        f"{captured.config.model_type}: the logits come from the last hidden state through {name}, which the distillation "
        "loss does not know"
    )
