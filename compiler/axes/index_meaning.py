"""What the numbers in an integer tensor stand for, where they are positions along an axis of the model.

A router's choice is such a tensor: its values are positions along the axis of experts. If that axis is narrowed, the values
are numbered anew all by themselves, because the operator that yields them counts positions in what is left. So they hold
nothing, as long as every reader treats them as positions: indexing with them reads that axis, counting them yields it,
sorting by them puts rows in its order. Whatever else reads them reads numbers, and then the axis is pinned.

The rules of the operators that treat positions as positions are marked (`positions=True`); `Tracer.visit` pins what any
other operator reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from minitron.compiler.axes.dims import Atom, Dim

AS_NUMBERS = "positions along it are numbers that the model goes on with"


@dataclass(frozen=True)
class Positions:
    """Values that are positions along `of`. `source`: the node whose values these are, in whatever order.

    `reason` and `place` (the reader's where it is empty) are what a pin says once they are read as numbers.
    """

    of: Dim
    source: Node
    reason: str = AS_NUMBERS
    place: str = ""


@dataclass(frozen=True)
class Counts:
    """For every index of `of`: how often it stands among the values of `source`."""

    of: Dim
    source: Node


@dataclass(frozen=True)
class Offsets:
    """For every index of `of`: how many values of `source` are not beyond it, the running sum of their `Counts`."""

    of: Dim
    source: Node


Meaning = Positions | Counts | Offsets


@dataclass(frozen=True)
class Sorted:
    """Rows that were put in the order of positions along `by`: another numbering of `by` is another order of `rows`.

    That changes nothing as long as no order of `rows` does: nothing cuts, splits or counts them, they never meet rows that
    stand in an order of their own, and what reads them by the groups that `by` makes knows these groups from `source`.
    """

    rows: Atom
    by: Dim
    source: Node
    place: str
