"""Index lists: the kept indices of every leaf, and those of a dimension that is made of several leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from minitron.compiler.axes.dims import Atom, Dim, Size, Space, size_of

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dependent:
    """A leaf whose kept indices differ with the index of other leaves: `lists[i]` belongs to index i of their product.

    All lists that belong to kept indices are equally long. The repeats of a key-value group are such a leaf: which query
    heads stay may differ between groups, because no key or value depends on them. So are the channels of an expert, whose
    `parents` then stand in another dimension of the weights.
    """

    parents: Dim
    lists: Sequence[Indices]
    count: int


@dataclass(frozen=True)
class Narrowing:
    """The kept indices of each narrowed leaf. Leaves that are not named are kept whole. Keys are representatives."""

    space: Space
    kept: Mapping[Atom, Indices] = field(default_factory=dict)
    dependent: Mapping[Atom, Dependent] = field(default_factory=dict)

    def touches(self, dim: Dim) -> bool:
        """Checks whether any leaf of the dimension is narrowed."""
        return any(leaf in self.kept or leaf in self.dependent for leaf in self.space.leaves(dim))

    def count(self, dim: Dim) -> int:
        """The narrowed size of an integer dimension."""
        return self.size(dim).coefficient

    def size(self, dim: Dim) -> Size:
        """The narrowed size of a dimension."""
        result = Size(1)
        for atom in self.space.flat(dim):
            if atom in self.kept:
                result = result * Size(len(self.kept[atom]))
            elif atom in self.dependent:
                result = result * Size(self.dependent[atom].count)
            elif atom.parts is not None:
                result = result * Size(sum(self.count(part) for part in atom.parts))
            else:
                result = result * atom.size
        return result

    def positions(self, dim: Dim, fixed: Mapping[Atom, int] | None = None) -> Indices:
        """The kept indices of an integer dimension, ascending wherever the lists of its leaves are.

        `fixed` gives an index to the parents that do not stand in the dimension itself.
        """
        return self._product(self.space.flat(dim), dict(fixed or {}))

    def elsewhere(self, dim: Dim) -> Dim:
        """The parents of dependent leaves that do not stand in the dimension itself."""
        leaves = list(self.space.leaves(dim))
        parents = [parent for leaf in leaves if leaf in self.dependent for parent in self.dependent[leaf].parents]
        return tuple(dict.fromkeys(parent for parent in parents if parent not in leaves))

    def positions_beside(self, dim: Dim, beside: Dim) -> Indices:
        """[k, n]: for each of the k kept indices of `beside`, which holds the parents, the n kept indices of `dim`."""
        atoms = self.space.flat(beside)
        places = np.unravel_index(self.positions(beside), [atom.size.coefficient for atom in atoms])
        rows = [
            self.positions(dim, dict(zip(atoms, map(int, place), strict=True))) for place in zip(*places, strict=True)
        ]
        return np.stack(rows)

    def before(self, dim: Dim, offset: int) -> int:
        """Counts the kept indices of a dimension before `offset`, where the dimension is cut: the same for all
        parents."""
        fixed = dict.fromkeys(self.elsewhere(dim), 0)
        return int(np.count_nonzero(self.positions(dim, fixed) < offset))

    def _product(self, atoms: Dim, fixed: dict[Atom, int]) -> Indices:
        if not atoms:
            return np.zeros(1, dtype=np.int64)
        first, rest = atoms[0], atoms[1:]
        stride = size_of(rest).coefficient
        own = self._own(first, fixed)
        if any(first in self.dependent[leaf].parents for leaf in self.space.leaves(rest) if leaf in self.dependent):
            blocks = [i * stride + self._product(rest, {**fixed, first: int(i)}) for i in own]
            return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)
        inner = self._product(rest, fixed)
        return (own[:, None] * stride + inner[None, :]).reshape(-1)

    def _own(self, atom: Atom, fixed: dict[Atom, int]) -> Indices:
        if atom in self.kept:
            return self.kept[atom]
        if atom in self.dependent:
            dependent = self.dependent[atom]
            number = 0
            for parent in dependent.parents:
                assert parent in fixed, "a dependent axis stands without the axis that it depends on"
                number = number * parent.size.coefficient + fixed[parent]
            return dependent.lists[number]
        if atom.parts is None:
            return np.arange(atom.size.coefficient, dtype=np.int64)
        offset, blocks = 0, []
        for part in atom.parts:
            blocks.append(offset + self._product(self.space.flat(part), fixed))
            offset += size_of(part).coefficient
        return np.concatenate(blocks)
