"""The result of the dimension analysis: the dimensions of every parameter and value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from minitron.compiler.axes.dims import Dim, Dims, Result, Space
from minitron.compiler.axes.index_meaning import Meaning, Sorted


@dataclass(frozen=True)
class Contraction:
    """`value[.., k]` meets `weight[.., k]` at `node`; `dim` is the axis k. `weight` is None between two activations."""

    node: Node
    value: Node
    weight: str | None
    dim: Dim


@dataclass(frozen=True)
class AttentionSite:
    """One attention: `heads` are its query heads (slow: key-value groups, fast: repeats), `value` the width of a value."""

    node: Node
    heads: Dim
    value: Dim


@dataclass(frozen=True)
class AxisTable:
    """The result of the analysis. `parameters`: canonical parameter name -> dimensions; `nodes`: the same for every
    value.

    `meanings` and `sorted` come from `compiler.axes.index_meaning`: the meaning of integers, and rows sorted by an
    axis.
    """

    space: Space
    parameters: dict[str, Dims]
    nodes: dict[Node, Result]
    contractions: list[Contraction]
    attentions: list[AttentionSite]
    unknown: dict[str, list[str]]
    meanings: dict[Any, Meaning] = field(default_factory=dict)
    sorted: list[Sorted] = field(default_factory=list)

    def dims(self, node: Node) -> Dims:
        """The dimensions of a single tensor."""
        return self.nodes[node]  # type: ignore[return-value]

    def results(self, node: Node) -> list[Dims]:
        """The dimensions of each result."""
        return each(self.nodes[node])


def each(result: Result) -> list[Dims]:
    """One list of dimensions, or several: a `Dim` is a tuple, a list of them a list."""
    return result if result and isinstance(result[0], list) else [result]  # type: ignore[list-item]
