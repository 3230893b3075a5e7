"""The teacher's weights with what dropped attention heads had folded into kept ones (Minitron, arXiv 2407.14679, section 2.3).

K of L heads stay, in the order of their scores. The kept head K - i takes in the dropped head K + 1 + i, i = 0, 1, ..: the last
that stays takes the first that is gone, and so on outwards until either side has no more. Its weights W become

    W + (W - W_dropped)

in everything that has a slice for each head: the projections of queries, keys and values with their biases, and the columns of
the output projection. For attention whose heads have keys and values of their own; where several query heads share them, what a
dropped head read is read by others too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from minitron.compiler.axes.narrowing import Indices, Narrowing
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.importance.scores import Scores, ScoreTable
from minitron.compiler.importance.select import Selection
from minitron.compiler.roles.roles import Heads, Roles
from minitron.compiler.weights.source import WeightSource


def merged(
    source: WeightSource, table: AxisTable, roles: Roles, scores: ScoreTable, selection: Selection
) -> MergedWeights:
    """Returns the weights with the dropped heads of every layer folded into its kept ones."""
    pairs = {layer: pair_heads(scores.heads[layer], kept) for layer, kept in selection.groups.items()}
    return MergedWeights(source, table, roles.heads, pairs)


def pair_heads(scores: Scores, kept: Indices) -> list[tuple[int, int]]:
    """Pairs of a kept head and the dropped one that it takes in. `scores` [heads], `kept` the heads that stay."""
    order = [int(head) for head in np.argsort(-scores.reshape(-1), kind="stable")]
    staying = set(kept.tolist())
    stay, gone = [head for head in order if head in staying], [head for head in order if head not in staying]
    return list(zip(reversed(stay), gone, strict=False))


class MergedWeights:
    """Yields each parameter in the teacher's shape, with the heads of `pairs` merged: layer -> (kept, dropped) pairs."""

    def __init__(
        self,
        source: WeightSource,
        table: AxisTable,
        heads: Mapping[int, Heads],
        pairs: Mapping[int, list[tuple[int, int]]],
    ) -> None:
        self.streamed = source.streamed
        self.source = source
        self._places: dict[str, list[tuple[int, Indices, Indices]]] = {}
        self._pairs = {layer: pairs[layer] for layer in sorted(pairs) if pairs[layer]}
        for layer, found in self._pairs.items():
            for name, axis, kept, dropped in _places(table, heads[layer], found):
                self._places.setdefault(name, []).append((axis, kept, dropped))

    def get(self, name: str) -> torch.Tensor:
        weight = self.source.get(name)
        for axis, kept, dropped in self._places.get(name, ()):
            exact = weight.double()
            into = torch.from_numpy(kept)
            merged = 2 * exact.index_select(axis, into) - exact.index_select(axis, torch.from_numpy(dropped))
            weight = exact.index_copy(axis, into, merged).to(weight.dtype)
        return weight

    def digest(self) -> str:
        """A hash of what is merged, beside what the source says of itself."""
        own = self.source.digest() if hasattr(self.source, "digest") else ""
        return hashlib.sha256(f"{own} {self._pairs}".encode()).hexdigest()


def _places(table: AxisTable, site: Heads, pairs: list[tuple[int, int]]) -> Iterator[tuple[str, int, Indices, Indices]]:
    """Yields parameter, axis, and the indices along it of the kept heads and of the dropped ones, in the same order."""
    assert site.group is not None
    for name, dims in table.parameters.items():
        for axis, dim in enumerate(dims):
            if site.group in table.space.leaves(dim):
                kept, dropped = (
                    np.concatenate(
                        [Narrowing(table.space, {site.group: np.array([pair[side]])}).positions(dim) for pair in pairs]
                    )
                    for side in (0, 1)
                )
                yield name, axis, kept, dropped
