"""Calls of graph nodes with values in the place of their arguments."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class Settings:
    """The device and dtype in which a graph runs: `graph_dtype` constants in it become `dtype`."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    graph_dtype: torch.dtype = torch.float32


def localised(arguments: Any, settings: Settings) -> Any:
    """Returns arguments with the device and the dtype that the graph runs with."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(settings.device)
        if value is settings.graph_dtype:
            return settings.dtype
        return value

    return map_aggregate(arguments, one)


def call(node: Node, arguments: tuple[Any, Any], values: Mapping[Node, Any]) -> Any:
    """The value of a node; `arguments` are its positional and keyword arguments, in which nodes stand for `values`."""
    args, kwargs = (
        map_aggregate(part, lambda one: values[one] if isinstance(one, Node) else one) for part in arguments
    )
    if node.target is operator.getitem:
        return args[0][args[1]]
    assert callable(node.target)
    return node.target(*args, **kwargs)
