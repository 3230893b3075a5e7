"""ATen operators: their names, their arguments, and the classes of them that several stages ask about.

Classes are by name without overload. The first four are disjoint; the others are made of them, each with the reason why it
holds more or less than its neighbours.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Node

# The same values in another dtype or on another device.
CASTS = {"to", "_to_copy", "type_as", "float"}
# The same values once more, or under another name.
COPIES = {"clone", "contiguous", "alias", "detach"}
# The same values in the same order, in another shape.
VIEWS = {"view", "_unsafe_view", "reshape", "flatten", "view_as", "reshape_as"}
# The same values in another order of dimensions.
TRANSPOSES = {"transpose", "t", "permute", "numpy_T", "mT"}

# Nothing about shape or order changes.
IDENTITIES = CASTS | COPIES
# Token ids, whatever they are viewed as: whoever looks up an embedding with these looks it up with the ids.
RESHAPES = VIEWS | IDENTITIES
# What a parameter is read through: its values, in an order that a transpose undoes. A view could merge its axes.
PASS_THROUGH = TRANSPOSES | IDENTITIES
# What an activation is moved through between a norm and the projection that reads it.
MOVES = VIEWS | TRANSPOSES | IDENTITIES
# What may stand between the last hidden state and the logits. A slice drops tokens; dropout does nothing in eval mode.
NEUTRAL = IDENTITIES | {"slice", "dropout"}
# Results that may share their operand's storage although their schemas do not say so: these copy only where they must.
# `clone` always copies; the others of VIEWS say in their schemas that they are views.
MAY_SHARE = {"reshape", "flatten", "reshape_as", "contiguous", "to", "type_as"}


def op_name(node: Node) -> str:
    """The name of a node's operator without its overload: `linear` for aten.linear.default."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return getattr(node.target, "__name__", str(node.target))


def is_op(node: Any, names: Collection[str]) -> bool:
    """Checks whether `node`, which may be any object, is a call of an operator with one of these names."""
    return isinstance(node, Node) and node.op == "call_function" and op_name(node) in names


def argument(node: Node, which: int | str, default: Any = None) -> Any:
    """An argument of an operator by its position or name in the schema, wherever it was written.

    `default` where it was left out, and where the schema has no such argument: operators of one class differ in that.
    """
    target = node.target
    names = [one.name for one in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
    if isinstance(which, str):
        position, name = (names.index(which) if which in names else len(node.args)), which
    else:
        position, name = which, names[which] if which < len(names) else ""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def axis_index(dim: int, rank: int) -> int:
    """A dimension number as counted from the front."""
    return dim % rank if rank else 0
