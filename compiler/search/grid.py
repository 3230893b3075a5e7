"""The grid: the values of every searched axis, written in the spec or proposed, and all their combinations.

Proposed values are those that hardware and serving like:

    hidden_size, widths     multiples of 256 for a teacher of 1024 or more, of 64 from 256, of 8 below; from a quarter of it
    query heads, groups     numbers that the largest possible of 8, 4 and 2 devices share evenly; from a half of the teacher's
    layers                  from a half of the teacher's; no more than 16 numbers
    experts                 multiples of 8 (of the router's groups too) from as many as the router needs

Combinations are never listed one by one before the budget has thinned them: a grid is held as one array for each axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minitron.compiler.estimate.deployment import PARALLEL_SIZES
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import (
    COUNTS,
    GROUPS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    NUM_EXPERTS,
    SCAN_HEAD_DIM,
    SCAN_HEADS,
)
from minitron.compiler.student.status import status_of
from minitron.specs.blocks.student import Student
from minitron.specs.errors import Problem
from minitron.specs.units import Share, Span, default_multiple

Numbers = npt.NDArray[np.int64]
Shapes = Mapping[str, Numbers]
"""Axis name -> the widths of each shape; all arrays are equally long."""

LEAST_WIDTH, LEAST_COUNT = 0.25, 0.5  # of the teacher's, that are proposed
MOST_DEPTHS = 16
MOST_SHAPES = 1_000_000  # the axis with the most values is thinned until there are no more combinations


@dataclass(frozen=True)
class Grid:
    """The values of each searched axis, ascending; `written` says that the spec lists them."""

    values: Mapping[str, tuple[int, ...]]
    written: bool

    @property
    def size(self) -> int:
        """The number of combinations."""
        return math.prod(len(values) for values in self.values.values())

    def combinations(self) -> dict[str, Numbers]:
        """Returns every combination: one array for each axis."""
        arrays = [np.array(values, dtype=np.int64) for values in self.values.values()]
        meshes = np.meshgrid(*arrays, indexing="ij") if arrays else []
        return {name: mesh.ravel() for name, mesh in zip(self.values, meshes, strict=True)}


def make_grid(student: Student, teacher: AnalysedTeacher, *, proposes: bool) -> tuple[Grid, list[Problem]]:
    """Returns the grid of a spec's `student`; without a list or range in it, and with `proposes`, the compiler's own.

    Problems are values that the teacher does not allow, at their places.
    """
    written: dict[str, tuple[int, ...]] = {}
    problems: list[Problem] = []
    several = False
    for key, value in student.targets():
        several |= isinstance(value, tuple | Span)
        written[key], wrong = _written(key, value, student.multiple_of, teacher)
        problems += wrong
    if several or not proposes:
        return Grid(written, True), problems
    proposed = {name: values for name, values in _proposed(teacher, student) if name not in written}
    return thinned(Grid({**written, **proposed}, False)), problems


def thinned(grid: Grid) -> Grid:
    """Returns the grid with every second value of its longest axis left out, as often as it takes; the ends stay."""
    values = {name: tuple(of) for name, of in grid.values.items()}
    while math.prod(len(of) for of in values.values()) > MOST_SHAPES:
        longest = max(values, key=lambda name: len(values[name]))
        of = values[longest]
        values[longest] = tuple(dict.fromkeys((*of[::2], of[-1])))
    return Grid(values, grid.written)


def _written(
    key: str, value: object, multiple_of: int | None, teacher: AnalysedTeacher
) -> tuple[tuple[int, ...], list[Problem]]:
    """Returns the values that a spec writes for an axis, and what is wrong with each."""
    path = f"student.{key}"
    if key not in teacher.widths:
        return (), [Problem(path, f"the teacher ({teacher.captured.config.model_type}) has no {key}", "leave it out")]
    widest = teacher.widths[key]
    step = 1 if key in COUNTS else multiple_of or default_multiple(widest)

    def resolved(one: object) -> int:
        return one.of(widest, step) if isinstance(one, Share) else int(one)  # type: ignore[call-overload]

    if isinstance(value, Span):
        least, most = resolved(value.least), resolved(value.most)
        stride = value.step or step
        found = tuple(dict.fromkeys((*range(least, most + 1, stride), most)))
        places = [path] * len(found)
    elif isinstance(value, tuple):
        found, places = tuple(map(resolved, value)), [f"{path}.{index}" for index in range(len(value))]
    else:
        found, places = (resolved(value),), [path]
    problems = {}
    status, reason = status_of(key, teacher)
    for width, place in zip(found, places, strict=True):
        if not 0 < width <= widest:
            message = f"{width} is not between 1 and the teacher's {widest}"
            hint = f"write at most {widest}" if width > 0 else "write a larger share, or a number"
            problems[place] = Problem(place, message, hint)
        elif width < widest and status == "refused":
            message = f"cannot be narrowed: {reason}"
            problems[place] = Problem(place, message, f"leave it out, or write {widest}")
    return tuple(sorted(set(found))), list(problems.values())


def _proposed(teacher: AnalysedTeacher, student: Student) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the axes that the teacher can lose, with their values."""
    for name, widest in teacher.widths.items():
        if name in (HEAD_DIM, SCAN_HEAD_DIM) or not hasattr(student, name):
            continue  # the width of a head is left alone: kernels know few
        if name == LAYERS:
            if student.layers is None and not teacher.no_ends:
                yield name, _depths(widest)
            continue
        if status_of(name, teacher)[0] == "refused":
            continue
        if name == GROUPS and teacher.widths[HEADS] == widest:
            continue  # a group is a head, and follows it
        values = _values(name, widest, teacher)
        if len(values) > 1:
            yield name, values


def _values(name: str, widest: int, teacher: AnalysedTeacher) -> tuple[int, ...]:
    if name in (HEADS, GROUPS):
        shared = next((size for size in reversed(PARALLEL_SIZES) if widest % size == 0 and widest > size), 1)
        return _multiples(shared, LEAST_COUNT, widest)
    if name == NUM_EXPERTS:
        mixtures = teacher.roles.mixtures.values()
        groups = max((one.groups for one in mixtures), default=1)
        least = max((one.least for one in mixtures), default=1)
        step = math.lcm(groups, 8 if widest % 8 == 0 else 1)
        return tuple(one for one in _multiples(step, LEAST_WIDTH, widest) if one >= least)
    if name == SCAN_HEADS:
        groups = max((scan.groups for scan in teacher.roles.scans.values()), default=1)
        return _multiples(groups, LEAST_COUNT, widest)
    return _multiples(width_multiple(widest), LEAST_WIDTH, widest)


def width_multiple(widest: int) -> int:
    """Returns the multiple of which proposed widths are: 256 is a block of K-quants and a tile of every GPU."""
    if widest >= 1024:
        return 256
    return 64 if widest >= 256 else 8


def _multiples(step: int, least: float, widest: int) -> tuple[int, ...]:
    first = -(-math.ceil(least * widest) // step) * step
    return tuple(dict.fromkeys((*range(first, widest, step), widest)))


def _depths(widest: int) -> tuple[int, ...]:
    first = math.ceil(LEAST_COUNT * widest)
    return tuple(dict.fromkeys((*range(first, widest, max(1, (widest - first) // MOST_DEPTHS)), widest)))


def completed(
    shapes: Shapes, teacher: AnalysedTeacher, follows: Mapping[str, str]
) -> tuple[dict[str, Numbers], npt.NDArray[np.bool_]]:
    """Returns every axis of each shape, and which shapes can be built.

    Axes that the grid has not are the teacher's, or follow: query heads the groups, groups the heads where each has one, and
    `follows`, axis -> the axis whose share it keeps.
    """
    count = len(next(iter(shapes.values()))) if shapes else 1
    widths = teacher.widths
    found = {name: shapes[name] if name in shapes else np.full(count, widths[name], np.int64) for name in widths}
    if HEADS in widths:
        repeats = widths[HEADS] // widths[GROUPS]
        if GROUPS in shapes and HEADS not in shapes:
            found[HEADS] = found[GROUPS] * repeats
        elif repeats == 1 and HEADS in shapes and GROUPS not in shapes:
            found[GROUPS] = found[HEADS]
    for name, leader in follows.items():
        if name not in shapes:
            found[name] = widths[name] * found[leader] // widths[leader]
    possible = np.ones(count, dtype=np.bool_)
    if HEADS in widths:
        heads, groups = found[HEADS], found[GROUPS]
        possible &= (heads % groups == 0) & (heads // groups <= repeats)
    for name, leader in follows.items():
        possible &= (widths[name] * found[leader]) % widths[leader] == 0
    return found, possible
