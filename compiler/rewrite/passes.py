"""The definition of a rewriting pass: a function of a graph module, with a postcondition checked at every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from minitron.compiler.graph.graph_module import rebuild


@dataclass(frozen=True)
class Pass:
    """`run` rewrites a graph module in place; `ensures` raises AssertionError where the result is not as promised."""

    name: str
    run: Callable[[GraphModule], None]
    ensures: Callable[[GraphModule], None]


class PassFailed(AssertionError):
    """A pass did not keep its promise: a bug of ours. The message names the pass."""


def run_passes(graph_module: GraphModule, passes: Sequence[Pass]) -> GraphModule:
    """Runs passes over a copy of `graph_module`, in order, and checks each one's postcondition."""
    current = rebuild(graph_module)
    for one in passes:
        one.run(current)
        current.graph.lint()
        current.recompile()
        try:
            one.ensures(current)
        except AssertionError as error:
            raise PassFailed(f"pass {one.name}: {error}") from error
    return current
