"""Constants that depend on a narrowed width: found by comparing two graphs, repaired in the weights, or refused.

The rewritten graph holds the teacher's constants; the student's own modelling code, built from the narrowed
configuration, computes its own when it is loaded. Where they differ, a reload would be another function. Two places are
compared: the buffers that a model computes for itself, and the numbers written into operators.

What can be repaired is a factor on the output of an embedding, as sqrt(hidden_size) is: the teacher's factor over the
student's goes into the embedding. Where the same matrix is the head, its inverse goes into the norm before the head,
whose weight w (or 1 + w) is linear in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import PASS_THROUGH, is_op, op_name
from minitron.compiler.graph.names import strip_wrapper
from minitron.compiler.weights.recipes import Recipe
from minitron.specs.errors import UsageError

EQUAL = 1e-6  # two constants closer than this (relative) are one constant computed in two ways


def changed_buffers(
    captured: Captured,
    teacher: Mapping[str, torch.Tensor],
    student: Mapping[str, torch.Tensor],
    numbers: Mapping[int, int],
) -> dict[str, str]:
    """The buffers that differ: the student's name of each -> the teacher's, which has another number where layers before
    it are dropped."""
    changed = {}
    for name, value in teacher.items():
        layer = captured.layer_in_path(name)
        if layer is not None and layer not in numbers:
            continue
        new = captured.renumbered(name, numbers)
        other = student.get(new)
        if (
            other is None
            or other.shape != value.shape
            or not torch.allclose(other.double(), value.double(), rtol=EQUAL, atol=0)
        ):
            changed[new] = name
    return changed


def check_scalars(teacher: Captured, student: Captured, numbers: Mapping[int, int]) -> None:
    """Raises UsageError where a number written into an operator depends on a narrowed width, or on the position of a
    layer among the others. `numbers`: the teacher's number of each layer that is compared -> the student's."""
    renumbered = any(old != new for old, new in numbers.items()) or len(numbers) < teacher.layer_count
    mine, theirs = _scalars(teacher, numbers), _scalars(student, None)
    for module, found in mine.items():
        other = theirs.get(module)
        if other is None or [op for op, _ in found] != [op for op, _ in other]:
            continue  # another structure (one query head a group, say): the verifier compares its values
        for (op, old), (_, new) in zip(found, other, strict=True):
            if abs(old - new) > EQUAL * max(abs(old), abs(new)):
                on = (
                    "a narrowed width, or on how many layers stand before or beside it"
                    if renumbered
                    else "a narrowed width"
                )
                raise UsageError(
                    f"{op} in {module or 'the model'} multiplies or adds a constant that depends on {on} "
                    f"({old:g} in the teacher, {new:g} in the student when it is loaded); no repair is known for it"
                )


def constants_of_layers(captured: Captured) -> list[dict[str, list[float]]]:
    """Operator and place within the layer -> the constants there, for each layer."""
    result: list[dict[str, list[float]]] = [{} for _ in range(captured.layer_count)]
    for module, found in _scalars(captured, None).items():
        layer = captured.layer_in_path(module + ".")
        if layer is not None:
            place = (module + ".").removeprefix(f"{captured.layer_path}.{layer}.")
            for op, value in found:
                result[layer].setdefault(f"{op} in {place}", []).append(value)
    return result


def _scalars(captured: Captured, numbers: Mapping[int, int] | None) -> dict[str, list[tuple[str, float]]]:
    """Module -> the operators in it that have a fractional or arithmetic constant, in order."""
    result: dict[str, list[tuple[str, float]]] = {}
    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        module = captured.module_of(node)
        layer = captured.layer_in_path(module + ".")
        if numbers is not None and layer is not None:
            if layer not in numbers:
                continue
            module = captured.renumbered(module + ".", numbers).rstrip(".")
        name = op_name(node)
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, float):
                result.setdefault(module, []).append((name, value))
    return result


def repair_scale(graph_module: GraphModule, name: str, ratio: float, recipes: dict[str, Recipe]) -> None:
    """Folds `ratio` (the teacher's factor over the student's) of the scalar buffer `name` into the weights' recipes.
    Raises UsageError where the factor is not one on the output of an embedding, or the head that shares it cannot be
    repaired.
    """
    refusal = (
        f"{name} depends on a narrowed width and is recomputed when the student is loaded; no repair is known for it"
    )
    table = next(n for n in graph_module.graph.nodes if n.op == "get_attr" and strip_wrapper(str(n.target)) == name)
    products = list(_readers(table))
    if len(products) != 1 or not is_op(products[0], {"mul"}):
        raise UsageError(refusal)
    others = [_behind(a) for a in products[0].args if isinstance(a, Node) and _behind(a) is not table]
    if len(others) != 1 or not is_op(others[0], {"embedding"}):
        raise UsageError(refusal)
    weight = others[0].args[0]
    assert isinstance(weight, Node)
    key = strip_wrapper(str(weight.target))
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target == weight.target:
            for reader in _readers(node):
                if reader is not others[0]:
                    _repair_head(reader, ratio, recipes, refusal)
    recipes[key] = replace(recipes[key], scale=recipes[key].scale * ratio)


def _repair_head(reader: Node, ratio: float, recipes: dict[str, Recipe], refusal: str) -> None:
    """Divides the norm in front of a tied head by `ratio`."""
    if not is_op(reader, {"linear"}):
        raise UsageError(refusal)
    norm = _behind(reader.args[0])
    if not is_op(norm, {"mul"}) or any(_behind(user) is not norm and user is not reader for user in _readers(norm)):
        raise UsageError(refusal)
    for operand in norm.args:
        node, shift = _behind(operand), 0.0
        if is_op(node, {"add"}) and isinstance(node.args[1], int | float):
            node, shift = _behind(node.args[0]), float(node.args[1])
        if isinstance(node, Node) and node.op == "get_attr":
            key = strip_wrapper(str(node.target))
            if key in recipes:
                recipes[key] = replace(recipes[key], scale=recipes[key].scale / ratio, shift=shift)
                return
    raise UsageError(refusal)


def _behind(node: Any) -> Any:
    """The node that a value comes from, through casts and moves."""
    while is_op(node, PASS_THROUGH):
        node = node.args[0]
    return node


def _readers(node: Node) -> list[Node]:
    """Finds the nodes that read a value, through casts and moves."""
    result: list[Node] = []
    for user in node.users:
        if op_name(user) in PASS_THROUGH and user.args[0] is node:
            result += _readers(user)
        elif user.op == "call_function":
            result.append(user)
    return result
