"""The student between rewriting and writing: a graph, and a recipe for each of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.weights.recipes import Recipe


@dataclass(frozen=True)
class RewrittenStudent:
    """The rewritten graph, the recipe of every parameter, and what is left of every axis.

    `buffers` are those that the student's own code computes when it is loaded in float32; `repaired` says that constants
    were folded into weights, because those buffers are not the teacher's.
    """

    graph_module: GraphModule
    recipes: Mapping[str, Recipe]
    narrowing: Narrowing
    buffers: Mapping[str, torch.Tensor]
    repaired: bool
