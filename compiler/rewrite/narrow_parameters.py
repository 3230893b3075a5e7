"""Pass: narrow parameters.

1. Every parameter that holds a narrowed axis gets the shape that is left, on the meta device: bytes come when the student is
   written. Tied parameters, which are one parameter in the graph, stay tied.
2. Nothing else is touched: the sizes that other operators hold as constants follow in `shape_constants`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule

from minitron.compiler.axes.dims import Dims, Result
from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.graph.graph_module import attribute, set_attribute
from minitron.compiler.graph.names import strip_wrapper
from minitron.compiler.rewrite.passes import Pass


def narrow_parameters(dims_of: Mapping[str, Result], narrowing: Narrowing) -> Pass:
    """`dims_of`: node name -> dimensions, as the analysis of the teacher found them."""

    def wanted(name: str) -> tuple[int, ...]:
        dims: Dims = dims_of[name]  # type: ignore[assignment]
        return tuple(narrowing.count(dim) for dim in dims)

    def run(graph_module: GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if node.op != "get_attr":
                continue
            old = attribute(graph_module, str(node.target))
            shape = wanted(node.name)
            if tuple(old.shape) != shape:
                set_attribute(graph_module, str(node.target), _narrowed(old, shape))

    def ensures(graph_module: GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                shape = tuple(attribute(graph_module, str(node.target)).shape)
                name = strip_wrapper(str(node.target))
                assert shape == wanted(node.name), f"{name} is {shape}, not {wanted(node.name)}"

    return Pass("narrow_parameters", run, ensures)


def _narrowed(old: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    new = torch.empty(shape, dtype=old.dtype, device="meta")
    return torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new
