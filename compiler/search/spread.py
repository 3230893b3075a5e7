"""Chooses a few of many points so that they are spread over all: each next one is the farthest from those before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from minitron.compiler.search.grid import Shapes

Points = npt.NDArray[np.float64]


def shares(shapes: Shapes, teacher: Mapping[str, int], axes: Sequence[str]) -> Points:
    """The points [shapes, axes]: of each axis the share of the teacher's width that is kept."""
    count = len(next(iter(shapes.values())))
    columns = [shapes[name] / teacher[name] for name in axes]
    return np.stack(columns, axis=1) if columns else np.zeros((count, 1))


def most_even(points: Points) -> int:
    """Returns the point whose coordinates differ least from each other: a shape that keeps the same share of every axis."""
    return int(np.argmin(points.max(axis=1) - points.min(axis=1)))


def farthest_first(points: Points, first: int) -> Iterator[int]:
    """Yields every point: `first`, then always the one that is farthest from those before it; of equal ones the earliest.

    Coordinates are measured in the range that all points span, so that an axis counts as much as another.
    """
    span = np.ptp(points, axis=0)
    scaled = points / np.where(span > 0, span, 1.0)
    distance = np.full(len(points), np.inf)
    index = first
    for _ in range(len(points)):
        yield index
        distance = np.minimum(distance, np.square(scaled - scaled[index]).sum(axis=1))
        distance[index] = -1.0
        index = int(np.argmax(distance))


def largest(inside: npt.NDArray[np.bool_], sizes: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Marks the points of a grid that are `inside` and no larger one along an axis is: a student that keeps less of everything
    than another within the same budget would not win.

    `inside` are the points of a grid of `sizes` in the order of its combinations, every axis ascending.
    """
    grid = inside.reshape(tuple(sizes))
    beyond = np.zeros_like(grid)
    for axis in range(grid.ndim):
        reached = np.flip(np.logical_or.accumulate(np.flip(grid, axis), axis=axis), axis)
        shifted = np.zeros_like(grid)
        keep = [slice(None)] * grid.ndim
        into = [slice(None)] * grid.ndim
        keep[axis], into[axis] = slice(1, None), slice(0, -1)
        shifted[tuple(into)] = reached[tuple(keep)]
        beyond |= shifted
    return (grid & ~beyond).reshape(-1)
