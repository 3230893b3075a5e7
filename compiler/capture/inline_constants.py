"""Tensors that a model's code makes while it runs: export keeps them beside the graph, where no checkpoint has them.

Tensors of one value are written into the graph as constants. An index that is one number becomes a slice.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from minitron.compiler.graph.aten import op_name
from minitron.compiler.graph.graph_module import attribute
from minitron.specs.errors import UsageError

aten = torch.ops.aten


def inline(module: GraphModule, known: Collection[str], named: str) -> None:
    """Writes single values into the graph. `known` are the tensors of the model, each under `named` in the module.

    Raises UsageError for a tensor of several values: neither the checkpoint nor the model's buffers hold them.
    """
    for node in list(module.graph.nodes):
        name = str(node.target).removeprefix(named + ".")
        if node.op != "get_attr" or not node.users or name in known:
            continue
        value = attribute(module, str(node.target))
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_meta:
            raise UsageError(f"its code makes a tensor of its own while it runs, {name}")
        for user in list(node.users):
            if op_name(user) == "lift_fresh_copy":
                _write(module, user, value)
        if node.users:
            raise UsageError(f"its code makes a tensor of its own while it runs, {name}")
        module.graph.erase_node(node)


def _write(module: GraphModule, node: Node, value: torch.Tensor) -> None:
    """Replaces a node that yields a tensor of one value by an operator that makes the tensor, or by a slice of its
    readers."""
    number = value.item()
    if value.dim() == 1 and isinstance(number, int) and not isinstance(number, bool):
        for user in list(node.users):
            _slice(module, user, node, number)
    if node.users:
        with module.graph.inserting_before(node):
            arguments: dict[str, Argument] = {"dtype": value.dtype, "device": torch.device("cpu"), "pin_memory": False}
            full = module.graph.call_function(aten.full.default, (list(value.shape), number), arguments)
        full.meta = dict(node.meta)
        node.replace_all_uses_with(full)
    module.graph.erase_node(node)


def _slice(module: GraphModule, user: Node, index: Node, number: int) -> None:
    """x[.., [number], ..], which has one index along one dimension and all of the others, is a slice."""
    if user.target is not aten.index.Tensor:
        return
    indices = list(user.args[1])  # type: ignore[arg-type]
    if [one for one in indices if one is not None] != [index]:
        return
    end = number + 1 if number != -1 else sys.maxsize
    with module.graph.inserting_before(user):
        cut = module.graph.call_function(aten.slice.Tensor, (user.args[0], indices.index(index), number, end))
    cut.meta = dict(user.meta)
    user.replace_all_uses_with(cut)
    module.graph.erase_node(user)
