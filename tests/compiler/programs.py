"""Random programs of the axis algebra, as a graph would run them, with every relation that they state written down.

A relation is between dimensions whose index lists must fit each other for any choice of what is kept. `holds` says so
in terms of plain lists of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from minitron.compiler.axes.dims import Dim, Size, Space, size_of

Positions = Callable[[Dim], list[int]]
LARGEST = 96


def number(dim: Sequence[object]) -> int:
    return size_of(dim).coefficient  # type: ignore[arg-type]


def product(dims: Sequence[Dim]) -> Dim:
    return tuple(atom for dim in dims for atom in dim)


@dataclass(frozen=True)
class Same:
    """`unify`, or a view, or a stride: both sides are one axis."""

    left: Dim
    right: Dim

    def holds(self, positions: Positions) -> bool:
        return positions(self.left) == positions(self.right)


@dataclass(frozen=True)
class Piece:
    """`slice`: what is kept of a piece is what is kept of the whole within its bounds."""

    whole: Dim
    start: int
    stop: int
    piece: Dim

    def holds(self, positions: Positions) -> bool:
        inside = [i - self.start for i in positions(self.whole) if self.start <= i < self.stop]
        return positions(self.piece) == inside


@dataclass(frozen=True)
class Joined:
    """`cat`: what is kept of each piece, one after the other."""

    pieces: tuple[Dim, ...]
    whole: Dim

    def holds(self, positions: Positions) -> bool:
        expected, offset = [], 0
        for piece in self.pieces:
            expected += [offset + i for i in positions(piece)]
            offset += number(piece)
        return positions(self.whole) == expected


@dataclass
class Program:
    """The dimensions that a program has made, and what it said of them."""

    space: Space = field(default_factory=Space)
    dims: list[Dim] = field(default_factory=list)
    relations: list[Same | Piece | Joined] = field(default_factory=list)

    def add(self, *dims: Dim) -> None:
        self.dims += dims


@st.composite
def programs(draw: st.DrawFn, *, longest: int = 10) -> Program:
    """A few fresh dimensions, then operations on whatever is there."""
    program = Program()
    for size in draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), min_size=2, max_size=5)):
        program.add(program.space.fresh(Size(size)))
    for _ in range(draw(st.integers(1, longest))):
        draw(st.sampled_from([_unify, _slice, _cat, _reshape, _stride, _flatten, _pin]))(draw, program)
    program.space.settle()
    return program


def _any(draw: st.DrawFn, program: Program) -> Dim:
    """What was made last comes up first: graphs go on with what they have just computed."""
    return draw(st.sampled_from(program.dims[::-1]))


def _unify(draw: st.DrawFn, program: Program) -> None:
    a = _any(draw, program)
    b = draw(st.sampled_from([dim for dim in program.dims if size_of(dim) == size_of(a)]))
    program.space.unify(a, b, "unify")
    program.relations.append(Same(a, b))


def _slice(draw: st.DrawFn, program: Program) -> None:
    whole = _any(draw, program)
    start = draw(st.integers(0, number(whole) - 1))
    stop = draw(st.integers(start + 1, number(whole)))
    piece = program.space.slice(whole, start, stop, "slice")
    program.add(piece)
    program.relations.append(Piece(whole, start, stop, piece))


def _cat(draw: st.DrawFn, program: Program) -> None:
    pieces = draw(st.lists(st.sampled_from(program.dims), min_size=1, max_size=3))
    if sum(number(piece) for piece in pieces) <= LARGEST:
        whole = program.space.cat(pieces)
        program.add(whole)
        program.relations.append(Joined(tuple(pieces), whole))


def _reshape(draw: st.DrawFn, program: Program) -> None:
    dims = [_any(draw, program), *draw(st.lists(st.sampled_from(program.dims), max_size=1))]
    total = number(product(dims))
    if total <= LARGEST:
        slow = draw(st.sampled_from([k for k in range(1, total + 1) if total % k == 0]))
        result = program.space.reshape(dims, [Size(slow), Size(total // slow)], "view")
        program.add(*result)
        program.relations.append(Same(product(dims), product(result)))


def _stride(draw: st.DrawFn, program: Program) -> None:
    whole = _any(draw, program)
    if number(whole) % 2 == 0:
        slow, fast = program.space.interleaved(whole, 2, "slice")
        program.add(slow)
        program.relations.append(Same(whole, (*slow, *fast)))


def _flatten(draw: st.DrawFn, program: Program) -> None:
    """Two dimensions in the other order, flattened: what a transpose and a view make."""
    a, b = _any(draw, program), _any(draw, program)
    if number(a) * number(b) <= LARGEST:
        program.add((*b, *a))


def _pin(draw: st.DrawFn, program: Program) -> None:
    program.space.pin(_any(draw, program), "a table")
