"""Graph modules that hold a graph and its tensors, and nothing of the machinery that they came from.

What `torch.export` gives carries guards, tree specifications and fake tensors; copying those with `copy.deepcopy` has been
seen to corrupt the heap (torch 2.13). So a captured graph is moved into a plain module once, and copies are made here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, GraphModule, Node


def attribute(graph_module: torch.nn.Module, target: str) -> torch.Tensor:
    """The parameter or buffer that a `get_attr` node reads."""
    path, _, name = target.rpartition(".")
    value = getattr(graph_module.get_submodule(path), name)
    assert isinstance(value, torch.Tensor)
    return value


def set_attribute(root: torch.nn.Module, target: str, value: torch.Tensor) -> None:
    """Sets a parameter (where `value` is one) or a buffer, and makes the modules on the way to it."""
    path, _, name = target.rpartition(".")
    holder = root
    for step in filter(None, path.split(".")):
        if step not in holder._modules:
            holder.add_module(step, torch.nn.Module())
        child = holder._modules[step]
        assert child is not None
        holder = child
    holder._parameters.pop(name, None)
    holder._buffers.pop(name, None)
    if isinstance(value, torch.nn.Parameter):
        holder.register_parameter(name, value)
    else:
        holder.register_buffer(name, value)


def fixed_length(graph: Graph) -> int | None:
    """Returns the fixed sequence length of a captured graph; None where the length is dynamic."""
    length = next(node for node in graph.nodes if node.op == "placeholder").meta["val"].shape[1]
    return length if isinstance(length, int) else None


def result_of(graph: Graph) -> Node:
    """Returns the one value that a graph yields, whatever tuples it is wrapped in."""
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    while isinstance(result, tuple | list):
        (result,) = result
    assert isinstance(result, Node)
    return result


def rebuild(
    source: GraphModule,
    rename: Callable[[str], str] = lambda target: target,
    tensor: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
) -> GraphModule:
    """A new graph module with the nodes of `source`, named as they are there.

    Its one result is the tensor that `source` returns. `rename` gives `get_attr` targets new names; `tensor` makes the new
    tensor of an old one, by default the same object.
    """
    graph = Graph()
    values: dict[Node, Node] = {}
    root = torch.nn.Module()
    for node in source.graph.nodes:
        if node.op == "output":
            graph.output(values[result_of(source.graph)])
            continue
        copied = graph.node_copy(node, lambda old: values[old])
        values[node] = copied
        if node.op == "get_attr":
            value = attribute(source, str(node.target))
            copied.target = rename(str(node.target))
            set_attribute(root, copied.target, _like(value, tensor(value)))
    return GraphModule(root, graph)


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Wraps `new` as a parameter where `old` is one."""
    if isinstance(old, torch.nn.Parameter) and not isinstance(new, torch.nn.Parameter):
        return torch.nn.Parameter(new, requires_grad=False)
    return new


def empty_meta(value: torch.Tensor) -> torch.Tensor:
    """Makes an empty tensor of the same shape and dtype on the meta device."""
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
