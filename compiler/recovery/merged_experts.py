"""The teacher's weights with what dropped experts compute merged into kept ones (M-SMoE, arXiv 2310.01334).

Each dropped expert joins the kept one whose outputs are nearest: the mean of what an expert yields on the calibration tokens
that are sent to it, weighted by the router (HC-SMoE, arXiv 2410.08589, clusters by mean outputs). Its neurons are first put
into the order in which its weights are nearest to those of the kept one (linear sum assignment over all matrices and biases
that a neuron stands in): any order computes the same. Then the kept expert becomes the mean of those that joined it and
itself, each weighted by the number of calibration tokens that it was sent. An expert that no token was sent to joins none.

The router stays what it is without the dropped rows: a token of a dropped expert goes to the kept experts that its router likes
next, and not always to the one that took its expert in. A router that sent it there would have to have several rows for one
expert, which is another architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minitron.compiler.axes.narrowing import Indices
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.importance.scores import Scores, ScoreTable, Seen
from minitron.compiler.importance.select import Selection, kept_experts
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.expert_weights import ExpertWeights, find_expert_weights, neurons_of, reordered
from minitron.compiler.roles.names import NUM_EXPERTS
from minitron.compiler.weights.source import WeightSource, find_source
from minitron.specs.progress import Task

Groups = Mapping[int, Sequence[int]]
"""A kept expert -> the dropped ones that join it."""


@dataclass(frozen=True)
class Joined:
    """An expert that has become part of another one: its number, its share of the whole, and the order of its neurons."""

    expert: int
    share: float
    order: Indices


@dataclass(frozen=True)
class MergedLayer:
    """The experts of one layer: kept expert -> what it becomes, itself first."""

    weights: ExpertWeights
    experts: Mapping[int, Sequence[Joined]]


def merge_experts(
    source: WeightSource, teacher: AnalysedTeacher, scores: ScoreTable, selection: Selection, task: Task
) -> MergedExperts:
    """Returns the weights with the dropped experts of every layer merged into its kept ones."""
    layers = {}
    for layer in selection.widths[NUM_EXPERTS]:
        seen = scores.experts[layer]
        weights = find_expert_weights(teacher.table, teacher.roles, layer)
        groups = group_experts(seen, kept_experts(selection, teacher.roles, layer, weights.count))
        layers[layer] = merge_layer(source, teacher.table, weights, groups, seen.tokens)
        task.advance(1)
    return MergedExperts(source, teacher.table, layers)


def group_experts(seen: Seen, kept: Sequence[int]) -> dict[int, list[int]]:
    """Groups dropped experts with the kept ones whose mean outputs are nearest; of equally near ones the lower number takes it.
    An expert that no token was sent to joins none."""
    staying, found = sorted(kept), dict[int, list[int]]()
    outputs = seen.outputs.astype(np.float64)
    reached = [expert for expert in staying if seen.tokens[expert] > 0]
    for expert in range(len(outputs)):
        if expert not in staying and reached and seen.tokens[expert] > 0:
            distances = np.square(outputs[reached] - outputs[expert]).sum(1)
            found.setdefault(reached[int(np.argmin(distances))], []).append(expert)
    return found


def merge_layer(
    source: WeightSource, table: AxisTable, weights: ExpertWeights, groups: Groups, tokens: Scores
) -> MergedLayer:
    """Aligns the experts of each group with the one that they join, and says what each kept expert is made of."""
    orders = align(source, table, weights, [(kept, one) for kept, joining in groups.items() for one in joining])
    made: dict[int, list[Joined]] = {}
    for kept, joining in groups.items():
        whole = float(tokens[[kept, *joining]].sum(dtype=np.float64))
        own = np.arange(weights.channels.size.coefficient)
        made[kept] = [Joined(kept, float(tokens[kept]) / whole, own)]
        made[kept] += [Joined(one, float(tokens[one]) / whole, orders[kept, one]) for one in joining]
    return MergedLayer(weights, made)


def align(
    source: WeightSource, table: AxisTable, weights: ExpertWeights, pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Indices]:
    """For each pair (a, b) of experts the order of b's neurons in which its weights are nearest to a's, by their squared
    differences. Each parameter is read once; the neurons of one pair are compared at a time."""
    count, found = weights.channels.size.coefficient, list[tuple[torch.Tensor, int, int, Indices]]()
    for name, axis in weights.axes.items() if pairs else ():
        for place, dim in enumerate(table.parameters[name]):
            if weights.channels in table.space.leaves(dim):
                neurons = neurons_of(table.space, weights.channels, dim)
                found.append((source.get(name), axis, place - (place > axis), neurons))
    return {pair: _nearest_order(found, pair, count) for pair in pairs}


def _nearest_order(
    found: Sequence[tuple[torch.Tensor, int, int, Indices]], pair: tuple[int, int], count: int
) -> Indices:
    """Solves the assignment of one pair. `found`: weights, the dimension of their experts, that of the neurons in the slice of
    an expert, and the neuron of each index there."""
    from scipy.optimize import linear_sum_assignment

    unlikeness = torch.zeros(count, count)
    for weight, axis, place, neurons in found:
        a, b = (_by_neuron(weight.select(axis, one), place, neurons, count) for one in pair)
        unlikeness.addmm_(a, b.T, alpha=-1)
    # Costs and not gains: to turn the signs itself, scipy would copy the matrix once more.
    order: Indices = linear_sum_assignment(unlikeness.numpy())[1].astype(np.int64)
    return order


def _by_neuron(part: torch.Tensor, axis: int, neurons: Indices, count: int) -> torch.Tensor:
    """[neurons, everything that a neuron has along `axis` of an expert's slice], in float32."""
    order = np.argsort(neurons, kind="stable")[int((neurons < 0).sum()) :]
    chosen = part.movedim(axis, 0).index_select(0, torch.from_numpy(order))
    return chosen.reshape(count, -1).float()


class MergedExperts:
    """Yields each parameter in the teacher's shape, kept experts made of those that joined them: layer -> what they become."""

    def __init__(self, source: WeightSource, table: AxisTable, layers: Mapping[int, MergedLayer]) -> None:
        self.streamed = source.streamed
        self.source, self._table = source, table
        self._layers = {layer: layers[layer] for layer in sorted(layers) if layers[layer].experts}
        self._of = {name: merged for merged in self._layers.values() for name in merged.weights.axes}

    def get(self, name: str) -> torch.Tensor:
        weight = self.source.get(name)
        merged = self._of.get(name)
        if merged is None:
            return weight
        axis, result = merged.weights.axes[name], weight.clone()
        for kept, joined in merged.experts.items():
            total = sum(one.share * self._slice(weight, name, merged.weights, one).double() for one in joined)
            assert isinstance(total, torch.Tensor)
            result.select(axis, kept).copy_(total)
        return result

    def _slice(self, weight: torch.Tensor, name: str, weights: ExpertWeights, one: Joined) -> torch.Tensor:
        """The slice of a parameter that is one expert's, its neurons in their new order."""
        axis, space = weights.axes[name], self._table.space
        part = weight.narrow(axis, one.expert, 1)
        for place, dim in enumerate(self._table.parameters[name]):
            if weights.channels in space.leaves(dim):
                order = reordered(space, weights.channels, dim, one.order)
                part = part.index_select(place, torch.from_numpy(order))
        return part.squeeze(axis)

    def digest(self) -> str:
        """A hash of what is merged, beside what the source says of itself."""
        digest = hashlib.sha256()
        if hasattr(self.source, "digest"):
            digest.update(self.source.digest().encode())
        for part in self._parts():
            digest.update(part)
        return digest.hexdigest()

    def _parts(self) -> Iterator[bytes]:
        for layer, merged in self._layers.items():
            for kept, joined in merged.experts.items():
                for one in joined:
                    yield f"{layer} {kept} {one.expert} {one.share!r}".encode() + one.order.tobytes()


def merged_in(source: WeightSource) -> MergedExperts | None:
    """Returns the merged weights that a source is made of; None where it has none."""
    return find_source(source, MergedExperts)
