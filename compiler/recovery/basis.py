"""The teacher's weights on the principal components of its residual stream."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from minitron.compiler.axes.table import AxisTable
from minitron.compiler.graph.graph_module import rebuild, set_attribute
from minitron.compiler.graph.names import WRAPPER, Fetch
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.recovery.rotated_weights import RotatedWeights, principal_basis
from minitron.compiler.recovery.tied import fit_tied, token_shares
from minitron.compiler.roles.rotation import Rotation, Tied
from minitron.compiler.weights.source import WeightSource

SPLIT = "untied_head"  # the name of the head's own matrix in a graph where it was tied


def principal_weights(
    source: WeightSource, rotation: Rotation, scores: ScoreTable, ids: torch.Tensor, kept: int
) -> RotatedWeights:
    """The rotated teacher, whose leading `kept` components the student keeps.

    Where the head is tied, the kept columns of the one matrix and the last norm's weight are fitted to both uses.
    """
    basis = principal_basis(torch.from_numpy(scores.covariance["hidden"]))
    rotated = RotatedWeights(source, rotation, basis)
    if rotation.tied is None:
        return rotated
    name, fold = rotation.tied.parameter, rotation.tied.fold
    embedding, head = rotated.get(name), rotated.behind(name, fold)
    gram = basis.T @ torch.from_numpy(scores.covariance["head"]) @ basis
    fit = fit_tied(embedding, head, gram, token_shares(ids, embedding.shape[0]), kept)
    matrix, weight = embedding.clone(), rotated.get(fold.parameter)
    matrix[:, :kept], weight[:kept] = fit.matrix, fit.weight * rotated.common_multiplier(fold) - fold.shift
    return RotatedWeights(source, rotation, basis, {name: matrix, fold.parameter: weight})


def rotated_reference(
    graph_module: GraphModule, table: AxisTable, weights: RotatedWeights, tied: Tied | None
) -> tuple[GraphModule, Fetch]:
    """The teacher's graph and the fetch of its rotated weights, nothing fitted: its logits are the teacher's.

    Where the head is tied it gets a matrix of its own here.
    """
    exact = weights.exact()
    if tied is None:
        return graph_module, exact.get
    split = rebuild(graph_module)
    nodes = {node.name: node for node in split.graph.nodes}
    for contraction in table.contractions:
        if contraction.weight == tied.parameter:
            node = nodes[contraction.node.name]
            behind = node.args[1]
            assert isinstance(behind, Node)
            node.replace_input_with(behind, _copied(split, split.graph, behind, node))
    split.graph.lint()
    split.recompile()

    def fetch(name: str) -> torch.Tensor:
        return exact.behind(tied.parameter, tied.fold) if name == SPLIT else exact.get(name)

    return split, fetch


def _copied(root: GraphModule, graph: Graph, node: Node, before: Node) -> Node:
    """The chain of views from a parameter, over again and over a parameter of its own."""
    source = node.args[0] if node.op == "call_function" else None
    copied = None if source is None else _copied(root, graph, source, before)  # type: ignore[arg-type]
    with graph.inserting_before(before):
        if copied is None:
            target = f"{WRAPPER}.{SPLIT}"
            set_attribute(root, target, torch.empty_like(node.meta["val"], device="meta"))
            made = graph.get_attr(target)
        else:
            made = graph.node_copy(node, lambda old: copied if old is source else old)
    made.meta = dict(node.meta)
    return made
