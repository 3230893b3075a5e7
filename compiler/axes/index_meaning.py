"""The meaning of the values in an integer tensor, where these values are positions along an axis of the model.

A router's choice is such a tensor: its values are positions along the axis of experts. If that axis is narrowed, the
values are renumbered automatically, because the operator that yields them counts positions in the narrowed axis. So
these values pin nothing as long as every reader treats them as positions: indexing with them reads that axis, counting
them yields that axis, sorting by them puts rows in its order. Any other reader reads plain values, and then the axis is
pinned.

Operators that treat positions as positions say how when their rule is registered (`positions=`, see `rules/registry.py`);
`analysis.visit` pins what any other operator reads.
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
    """The number of times that each index of `of` occurs among the values of `source`."""

    of: Dim
    source: Node


@dataclass(frozen=True)
class Offsets:
    """The number of values of `source` up to each index of `of`: the running sum of their `Counts`."""

    of: Dim
    source: Node


Meaning = Positions | Counts | Offsets


@dataclass(frozen=True)
class Sorted:
    """Rows that were put in the order of positions along `by`: another numbering of `by` is another order of `rows`.

    Renumbering `by` is safe as long as the order of `rows` has no effect: nothing cuts, splits or counts the rows, they
    never meet rows in another order, and an operator that reads them in groups of `by` takes these groups from
    `source`.
    """

    rows: Atom
    by: Dim
    source: Node
    place: str
