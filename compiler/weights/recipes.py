"""Recipes: how each parameter of the student is made of one of the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from minitron.compiler.axes.dims import Dims
from minitron.compiler.axes.narrowing import Indices, Narrowing
from minitron.compiler.capture.capture import Captured


@dataclass(frozen=True)
class Recipe:
    """The recipe of one student parameter: its `source` in the teacher, the kept positions per dimension (None: all).

    Positions [k, n] differ with the k kept indices of the dimension `beside`: the channels of each expert.
    `scale` and `shift` are the repairs that a constant asked for: w -> (w + shift) * scale - shift.
    """

    source: str
    positions: tuple[Indices | None, ...]
    scale: float = 1.0
    shift: float = 0.0
    beside: int = 0

    @property
    def rows(self) -> Indices | None:
        """The kept positions of the first dimension, where they are one ascending list."""
        first = self.positions[0] if self.positions else None
        if first is None or first.ndim != 1 or not len(first) or (np.diff(first) <= 0).any():
            return None
        return first

    def without_rows(self) -> Recipe:
        """The recipe for a weight of which `rows` alone were read."""
        return replace(self, positions=(None, *self.positions[1:]))

    def make(self, weight: torch.Tensor) -> torch.Tensor:
        """Makes the student's parameter from the teacher's, in the teacher's dtype."""
        for axis, kept in enumerate(self.positions):
            if kept is not None and kept.ndim == 1:
                weight = weight.index_select(axis, _on(kept, weight))
        for axis, kept in self._apart():
            slices = [part.index_select(axis, _on(row, weight)) for part, row in self._slices(weight, kept)]
            weight = torch.cat(slices, self.beside)
        if self.scale != 1.0:
            exact = weight.double()
            weight = ((exact + self.shift) * self.scale - self.shift).to(weight.dtype)
        return weight.contiguous()

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the teacher's parameter with zeros in place of everything that is not kept."""
        weight = weight.clone()
        for axis, kept in enumerate(self.positions):
            if kept is not None and kept.ndim == 1:
                weight.index_fill_(axis, _on(_gone(kept, weight.shape[axis]), weight), 0)
        for axis, kept in self._apart():
            owners = self.positions[self.beside]
            for number, row in zip(range(len(kept)) if owners is None else owners, kept, strict=True):
                part = weight.narrow(self.beside, int(number), 1)
                part.index_fill_(axis, _on(_gone(row, weight.shape[axis]), weight), 0)
        return weight

    def _apart(self) -> list[tuple[int, Indices]]:
        return [(axis, kept) for axis, kept in enumerate(self.positions) if kept is not None and kept.ndim == 2]

    def _slices(self, weight: torch.Tensor, kept: Indices) -> list[tuple[torch.Tensor, Indices]]:
        return list(zip(torch.split(weight, 1, self.beside), kept, strict=True))


def _on(indices: Indices, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(indices)).to(weight.device)


def _gone(kept: Indices, size: int) -> Indices:
    """Returns the indices that are not kept."""
    return np.setdiff1d(np.arange(size, dtype=np.int64), kept)


def recipes(
    captured: Captured, parameters: Mapping[str, Dims], narrowing: Narrowing, kept_layers: Sequence[int]
) -> dict[str, Recipe]:
    """Maps every parameter of the student to its recipe."""
    numbers = {old: new for new, old in enumerate(kept_layers)}
    result: dict[str, Recipe] = {}
    for name, dims in parameters.items():
        layer = captured.layer_in_path(name)
        if layer is not None and layer not in numbers:
            continue
        result[captured.renumbered(name, numbers)] = _recipe(name, dims, narrowing)
    return result


def _recipe(name: str, dims: Dims, narrowing: Narrowing) -> Recipe:
    positions: list[Indices | None] = []
    beside = 0
    for dim in dims:
        owners = narrowing.elsewhere(dim)
        if not narrowing.touches(dim):
            positions.append(None)
        elif not owners:
            positions.append(narrowing.positions(dim))
        else:
            (beside,) = (i for i, other in enumerate(dims) if set(owners) <= set(narrowing.space.leaves(other)))
            positions.append(narrowing.positions_beside(dim, dims[beside]))
    return Recipe(name, tuple(positions), beside=beside)
