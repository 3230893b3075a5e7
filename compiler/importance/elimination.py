"""Backward elimination on a Gram matrix: what can go when the projection that reads the rest is refitted.

A projection W reads X. Without the units U it can be refitted so that it yields W X as nearly as the others allow; the squared
error that this adds is tr(W_U (G^-1_UU)^-1 W_U^T) with G = X X^T. The unit with the least goes, W and G^-1 become those
of the rest, and so on to the last (optimal brain surgeon, Hassibi and Stork 1992, on whole units). The order is nested: it
serves every width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from minitron.compiler.axes.table import AxisTable, Contraction
from minitron.compiler.graph.aten import op_name
from minitron.compiler.graph.executor import Tap
from minitron.compiler.importance.covariance import Gram
from minitron.compiler.importance.ranks import Ranks
from minitron.compiler.importance.scores import Scores
from minitron.compiler.roles.names import HEADS
from minitron.compiler.roles.roles import Heads, Roles

# Share of the mean of the Gram matrix's diagonal that is added to it: directions that the data barely shows count for nothing.
RIDGE = 1e-2

# Eliminations of single columns whose updates of the two matrices are put off, to be made in one product.
PUT_OFF = 64


def eliminate(gram: torch.Tensor, weight_ON: torch.Tensor, size: int = 1) -> Scores:
    """For each unit of `size` neighbouring columns the step at which it is eliminated: [N / size], high: stays longest."""
    if size == 1:  # neither matrix has a name here: each goes when it is read for the last time
        return _single(_inverse(gram), _products(weight_ON))
    return eliminate_units(_inverse(gram), weight_ON.to(torch.float64, copy=True), size)


def _inverse(gram: torch.Tensor) -> torch.Tensor:
    """(gram + ridge)^-1 in float64."""
    regular = gram.to(torch.float64, copy=True)
    regular.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)
    inverse: torch.Tensor = torch.linalg.inv(regular)
    return inverse


def _products(weight_ON: torch.Tensor) -> torch.Tensor:
    weight = weight_ON.double()
    return weight.T @ weight


def _single(inverse_NN: torch.Tensor, products_NN: torch.Tensor) -> Scores:
    """The steps of single columns, from G^-1 and W^T W, of which each step needs the diagonals and one column.

    With the column u goes G^-1 - p p^T for p = G^-1_u / sqrt(G^-1_uu), and with a = G^-1_u / G^-1_uu every other column of W
    becomes W_j - a_j W_u, so that W^T W loses a q^T + q a^T for q = W^T W_u - |W_u|^2 a / 2. The diagonals are kept up to date;
    the matrices lose what `PUT_OFF` steps put together, and the columns that are gone.
    """
    steps = np.zeros(inverse_NN.shape[0], dtype=np.float32)
    names, step = torch.arange(len(steps)), 0
    while len(names):
        count = len(names)
        variances, norms = inverse_NN.diagonal().clone(), products_NN.diagonal().clone()
        p_NB, a_NB, q_NB = (torch.zeros(count, PUT_OFF, dtype=torch.float64) for _ in range(3))
        there = torch.ones(count, dtype=torch.bool)
        for i in range(min(PUT_OFF, count)):
            losses = torch.where(there, norms.clamp_min(0) / variances, torch.inf)
            gone = int(losses.argmin())
            steps[int(names[gone])], step = step, step + 1
            there[gone] = False
            column = inverse_NN[:, gone] - p_NB[:, :i] @ p_NB[gone, :i]
            product = products_NN[:, gone] - a_NB[:, :i] @ q_NB[gone, :i] - q_NB[:, :i] @ a_NB[gone, :i]
            a_NB[:, i] = column / column[gone]
            p_NB[:, i] = column / column[gone].sqrt()
            q_NB[:, i] = product - 0.5 * product[gone] * a_NB[:, i]
            variances -= p_NB[:, i].square()
            norms -= 2 * a_NB[:, i] * q_NB[:, i]
        left = there.nonzero()[:, 0]
        names = names[left]
        p_LB, a_LB, q_LB = p_NB[left], a_NB[left], q_NB[left]
        inverse_NN = inverse_NN[left]
        inverse_NN = inverse_NN[:, left]
        inverse_NN -= p_LB @ p_LB.T
        products_NN = products_NN[left]
        products_NN = products_NN[:, left]
        products_NN -= a_LB @ q_LB.T
        products_NN -= q_LB @ a_LB.T
    return steps


def eliminate_units(inverse: torch.Tensor, weight: torch.Tensor, size: int) -> Scores:
    """The steps of whole units; both matrices are changed in place."""
    count = inverse.shape[0] // size
    steps = np.zeros(count, dtype=np.float32)
    left = torch.arange(count)
    for step in range(count):
        rows = left[:, None] * size + torch.arange(size)
        blocks = inverse[rows[:, :, None], rows[:, None, :]]
        read = weight[:, rows].permute(1, 2, 0)
        losses = (read * torch.linalg.solve(blocks, read)).sum((1, 2))
        place = int(losses.argmin())
        gone = int(left[place])
        steps[gone] = step
        left = torch.cat([left[:place], left[place + 1 :]])
        unit = slice(gone * size, (gone + 1) * size)
        across = torch.linalg.solve(inverse[unit, unit], inverse[unit])
        weight -= weight[:, unit] @ across
        inverse -= inverse[:, unit] @ across
    return steps


def eliminate_heads(gram: torch.Tensor, weight_ON: torch.Tensor, site: Heads) -> Scores:
    """[groups, repeats]: groups in the order in which whole ones go, and in a group its query heads in theirs."""
    heads = site.groups * site.repeats
    width = gram.shape[0] // heads
    of_group = eliminate(gram, weight_ON, width * site.repeats)
    of_head = eliminate(gram, weight_ON, width).reshape(site.groups, site.repeats)
    return of_group[:, None] * (heads + 1) + of_head


@dataclass
class Elimination:
    """Gram matrices of what the projections behind an axis read, each there while its layer runs, and the orders that they
    lead to. Only the first `batches` are looked at: they run layer by layer, so one layer's matrices are held at a time.
    `settle` is called once a layer has run."""

    table: AxisTable
    roles: Roles
    fetch: Callable[[str], torch.Tensor]
    batches: int = 0
    orders: dict[str, Scores] = field(default_factory=dict)
    grams: dict[str, Gram] = field(default_factory=dict)
    _sites: dict[str, tuple[Contraction, Heads | None]] = field(default_factory=dict)

    def taps(self) -> list[tuple[str, Tap]]:
        """Node names and what to do with their values, for each axis that has a projection of two dimensions behind it."""
        return [(reader.value.name, self._tap(key, reader)) for key, reader in self.sites()]

    def sites(self) -> Iterator[tuple[str, Contraction]]:
        """Each such axis and the projection that reads it."""
        for layer, site in self.roles.heads.items():
            for reader in site.readers[:1]:
                if self._plain(reader):
                    yield f"{HEADS}.{layer}", reader
        for name, layers in self.roles.widths.items():
            for layer, width in layers.items():
                if len(width.readers) != 1 or width.parents:
                    continue
                (reader,) = width.readers
                if tuple(self.table.space.flat(reader.dim)) == (width.leaf,) and self._plain(reader):
                    yield f"{name}.{layer}", reader

    def _plain(self, reader: Contraction) -> bool:
        return reader.weight is not None and len(self.table.parameters[reader.weight]) == 2

    def _tap(self, key: str, reader: Contraction) -> Tap:
        name, _, layer = key.partition(".")
        self._sites[key] = (reader, self.roles.heads[int(layer)] if name == HEADS else None)

        def tap(value: torch.Tensor, number: int) -> None:
            if key not in self.orders and number < self.batches:
                self.grams.setdefault(key, Gram()).add(value.reshape(-1, value.shape[-1]))

        return tap

    def settle(self, ranks: Ranks) -> None:
        """Turns the matrices of the layer that has run into orders."""
        for key in list(self.grams):
            gram = self.grams.pop(key)
            assert gram.total is not None
            reader, site = self._sites[key]
            tokens = ranks.sum(torch.tensor(gram.tokens))
            total, weight = ranks.sum(gram.total.cpu()).div_(tokens), self._weight(reader)
            del gram
            self.orders[key] = eliminate(total, weight) if site is None else eliminate_heads(total, weight, site)

    def _weight(self, reader: Contraction) -> torch.Tensor:
        """[O, N]: written, read."""
        assert reader.weight is not None
        weight = self.fetch(reader.weight).float().cpu()
        first = tuple(self.table.space.flat(self.table.parameters[reader.weight][0]))
        reads_first = op_name(reader.node) != "linear" and first == tuple(self.table.space.flat(reader.dim))
        return weight.T if reads_first else weight
