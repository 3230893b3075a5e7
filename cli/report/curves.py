"""The records of train/metrics.jsonl, thinned out while they are read: a run of any length becomes a few hundred
points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from minitron.cli.sections import Document

# A curve has between this many points and twice as many, once there are more records than that.
POINTS = 200
# These say where on a curve a record stands.
_POSITION = ("step", "tokens")


@dataclass
class Figure:
    """The mean and range of one key over the records of a point."""

    total: float = 0.0
    count: int = 0
    low: float = math.inf
    high: float = -math.inf

    @property
    def mean(self) -> float:
        return self.total / self.count

    def take(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1
        self.low, self.high = min(self.low, value), max(self.high, value)

    def absorb(self, other: Figure) -> None:
        self.total, self.count = self.total + other.total, self.count + other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass
class Point:
    """Consecutive records, drawn at the position of the last of them."""

    step: int = 0
    tokens: float = 0.0
    records: int = 0
    figures: dict[str, Figure] = field(default_factory=dict)

    def absorb(self, later: Point) -> None:
        self.step, self.tokens, self.records = later.step, later.tokens, self.records + later.records
        for key, figure in later.figures.items():
            self.figures.setdefault(key, Figure()).absorb(figure)


@dataclass
class Curves:
    """All keys of the records over the tokens trained on."""

    points: list[Point] = field(default_factory=list)
    records: int = 0
    each: int = 1
    """The number of records in a point (the last point may have fewer)."""

    not_finite: int = 0
    """Figures that were NaN or infinite and are not drawn."""

    @property
    def keys(self) -> list[str]:
        """Returns the keys in the order of their first appearance."""
        return list(dict.fromkeys(key for point in self.points for key in point.figures))

    def of(self, key: str) -> list[tuple[float, Figure]]:
        """Returns (tokens, figure) of every point that has the key."""
        return [(point.tokens, point.figures[key]) for point in self.points if key in point.figures]


def read_curves(records: Iterable[Document], limit: int = POINTS) -> Curves:
    """Reads the records once, with at most 2 x `limit` points in memory: when full, neighbouring points are merged in
    pairs.
    """
    curves = Curves()
    for record in records:
        step, tokens = (_number(record.get(key)) for key in _POSITION)
        place = tokens if tokens is not None else step
        if place is None:
            continue
        point = Point(int(step or 0), place, 1)
        for key, raw in record.items():
            value = None if key in _POSITION else _number(raw)
            if value is not None and math.isfinite(value):
                point.figures.setdefault(key, Figure()).take(value)
            elif value is not None:
                curves.not_finite += 1
        curves.records += 1
        if curves.points and curves.points[-1].records < curves.each:
            curves.points[-1].absorb(point)
        else:
            curves.points.append(point)
        if len(curves.points) > 2 * limit:
            _halve(curves)
    return curves


def _halve(curves: Curves) -> None:
    merged = []
    for index in range(0, len(curves.points), 2):
        point = curves.points[index]
        for later in curves.points[index + 1 : index + 2]:
            point.absorb(later)
        merged.append(point)
    curves.points, curves.each = merged, 2 * curves.each


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
