"""The axis algebra: what a tensor dimension is made of, and which dimensions must be narrowed together.

A dimension (`Dim`) is a product of atoms, slowest first; a dimension of size one is the empty product. An atom is a
node of a union-find forest. Facts learnt about an atom later are kept as its structure:

    factors   a `view` split it: it is the product of other atoms
    parts     a `cat` made it, or a `slice`, `chunk` or `split` cut it: it is the concatenation of dimensions

Atoms without structure are *leaves*. Only leaves are ever narrowed; everything else follows from them. A pin on an atom
flows to every leaf below it, so a pin may come before the structure is learnt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils._sympy.functions import FloorDiv


@dataclass(frozen=True)
class Size:
    """A monomial: an integer times symbolic sizes (batch, sequence), as `2*s0*s1` is for the rows of a top-2 router."""

    coefficient: int
    symbols: tuple[str, ...] = ()

    @staticmethod
    def of(value: Any) -> Size:
        """Makes a size from an int or a `torch.SymInt`; an expression that is not a monomial (`s0 + 1`) becomes one opaque
        symbol."""
        if isinstance(value, int):
            return Size(value)
        expression = value.node.expr.replace(FloorDiv, _quotient)
        coefficient, rest = expression.as_coeff_Mul()
        if not coefficient.is_Integer:
            return Size(1, (str(expression),))
        symbols: list[str] = []
        for base, exponent in rest.as_powers_dict().items():
            if base == 1:
                continue
            if not (exponent.is_Integer and exponent > 0):
                return Size(1, (str(expression),))
            symbols += [str(base)] * int(exponent)
        return Size(int(coefficient), tuple(sorted(symbols)))

    def __mul__(self, other: Size) -> Size:
        return Size(self.coefficient * other.coefficient, tuple(sorted(self.symbols + other.symbols)))

    def divided_by(self, other: Size) -> Size | None:
        """The quotient, or None where the division leaves a rest."""
        if other.coefficient == 0 or self.coefficient % other.coefficient:
            return None
        rest = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        return Size(self.coefficient // other.coefficient, tuple(rest))

    @property
    def is_one(self) -> bool:
        return self.coefficient == 1 and not self.symbols

    def __str__(self) -> str:
        return "*".join(
            [*([str(self.coefficient)] if self.coefficient != 1 or not self.symbols else []), *self.symbols]
        )


def _quotient(dividend: Any, divisor: Any) -> Any:
    """The quotient of two expressions where nothing is left over: torch leaves (s**2) // s as it is."""
    exact = (dividend / divisor).cancel()
    return exact if exact.as_numer_denom()[1] == 1 else FloorDiv(dividend, divisor)


ONE = Size(1)


@dataclass(frozen=True, order=True)
class Pin:
    """The reason that an atom cannot be narrowed: `reason` in words, `place` the op and module that set the pin."""

    reason: str
    place: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.place})" if self.place else self.reason


@dataclass(frozen=True, order=True)
class Note:
    """A function of a whole axis that narrowing changes: `kind` is mean, layer_norm, softmax, ...; `node` the graph node."""

    kind: str
    node: str
    place: str


@dataclass(eq=False)
class Atom:
    """A node of the union-find forest (see the module docstring). Compare atoms by identity after `Space.find`."""

    number: int
    size: Size
    forward: Atom | None = None
    factors: tuple[Atom, ...] | None = None
    parts: tuple[Dim, ...] | None = None
    pins: set[Pin] = field(default_factory=set)
    notes: set[Note] = field(default_factory=set)
    broadcast: bool = False

    def __repr__(self) -> str:
        return f"<{self.number}:{self.size}>"


Dim = tuple[Atom, ...]

# The dimensions of one value, and those of a node: one value or several.
Dims = list[Dim]
Result = Dims | list[Dims]


def size_of(dim: Iterable[Atom]) -> Size:
    result = ONE
    for atom in dim:
        result = result * atom.size
    return result


class Space:
    """All atoms of one graph, and the operations on dimensions that op rules are written with."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._atoms: list[Atom] = []

    # -- making -------------------------------------------------------------------------------------------------------

    def fresh(self, size: Size, *, broadcast: bool = False) -> Dim:
        """Makes a new dimension without structure."""
        return () if size.is_one else (self._new(Atom(next(self._numbers), size, broadcast=broadcast)),)

    def _new(self, atom: Atom) -> Atom:
        self._atoms.append(atom)
        return atom

    def cat(self, dims: Sequence[Dim]) -> Dim:
        """The concatenation of dimensions; empty ones do not count."""
        dims = [dim for dim in dims if size_of(dim).coefficient > 0]
        if len(dims) == 1:
            return dims[0]
        total = sum(size_of(dim).coefficient for dim in dims)
        return (self._new(Atom(next(self._numbers), Size(total), parts=tuple(dims))),)

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, atom: Atom) -> Atom:
        """The representative of an atom."""
        while atom.forward is not None:
            if atom.forward.forward is not None:
                atom.forward = atom.forward.forward
            atom = atom.forward
        return atom

    def flat(self, dim: Dim) -> Dim:
        """The same dimension with every product replaced by its factors; concatenations stay single atoms."""
        result: list[Atom] = []
        for atom in dim:
            root = self.find(atom)
            result += self.flat(root.factors) if root.factors is not None else (root,)
        return tuple(result)

    def leaves(self, dim: Dim) -> Iterator[Atom]:
        """Every leaf a dimension is made of, repeats included."""
        for atom in self.flat(dim):
            if atom.parts is None:
                yield atom
            else:
                for part in atom.parts:
                    yield from self.leaves(part)

    def ways(self, dim: Dim) -> Iterator[set[Atom]]:
        """The sets of leaves that are multiplied with each other, one set for every way through the concatenations."""
        result: list[set[Atom]] = [set()]
        for atom in self.flat(dim):
            each = [{atom}] if atom.parts is None else [way for part in atom.parts for way in self.ways(part)]
            result = [have | way for have in result for way in each]
        yield from result

    def describe(self, dim: Dim) -> str:
        """Formats a dimension for people: x is a product, + a concatenation, ! a pin."""
        words = []
        for atom in self.flat(dim):
            mark = "!" if atom.pins else ""
            if atom.parts is None:
                words.append(f"{atom.size}{mark}")
            else:
                words.append("(" + " + ".join(self.describe(part) for part in atom.parts) + ")" + mark)
        return " x ".join(words) or "1"

    def settle(self) -> None:
        """Hands every pin and note down to the leaves. Call this once, after the whole graph is analysed."""
        for atom in self._atoms:
            if atom.forward is None and (atom.pins or atom.notes) and (atom.factors or atom.parts):
                below = [atom.factors] if atom.factors is not None else list(atom.parts or ())
                for dim in below:
                    for leaf in self.leaves(dim):
                        leaf.pins |= atom.pins
                        leaf.notes |= atom.notes

    # -- learning -----------------------------------------------------------------------------------------------------

    def pin(self, dim: Dim, reason: str, place: str = "") -> None:
        """Pins every leaf of a dimension, so that none of them is narrowed."""
        for atom in dim:
            self.find(atom).pins.add(Pin(reason, place))

    def note(self, dim: Dim, note: Note) -> None:
        """Attaches a note to a dimension: narrowing any of its leaves changes the function that `note` names."""
        for atom in dim:
            self.find(atom).notes.add(note)

    def unify(self, a: Dim, b: Dim, place: str) -> None:
        """Makes both dimensions one axis, narrowed together or not at all. Sizes of one (broadcast) are left alone."""
        left, right = list(self.flat(a)), list(self.flat(b))
        while left and right:
            x, y = self.find(left.pop()), self.find(right.pop())
            if x is y:
                continue
            if x.factors is not None or y.factors is not None:  # learnt in this very loop
                left += self.flat((x,))
                right += self.flat((y,))
                continue
            if x.size == y.size:
                self._merge(x, y, place)
                continue
            if x.size.divided_by(y.size) is None:
                x, y, left, right = y, x, right, left
            rest = self._split_factor(x, y, place)
            if rest is None:
                self._pin_both((*left, x), (*right, y), place)
                return
            left += rest
        if left or right:
            self._pin_both(a, b, place)

    def _pin_both(self, a: Dim, b: Dim, place: str) -> None:
        reason = f"two views cut this axis in ways that do not match ({self.describe(a)} and {self.describe(b)})"
        self.pin(a, reason, place)
        self.pin(b, reason, place)

    def _merge(self, x: Atom, y: Atom, place: str) -> None:
        """Merges two different atoms of one size, neither of them a product."""
        if x.parts is not None and y.parts is not None:
            self._unify_parts(list(x.parts), list(y.parts), place)
        elif y.parts is not None:
            x, y = y, x
        y.forward = x
        x.pins |= y.pins
        x.notes |= y.notes
        x.broadcast = x.broadcast and y.broadcast

    def _unify_parts(self, left: list[Dim], right: list[Dim], place: str) -> None:
        """Refines two concatenations at each other's boundaries and unifies what lies between."""
        left, right = left[::-1], right[::-1]
        while left and right:
            a, b = left.pop(), right.pop()
            size_a, size_b = size_of(a).coefficient, size_of(b).coefficient
            if size_a > size_b:
                a, rest = self._cut(a, size_b, place)
                left.append(rest)
            elif size_b > size_a:
                b, rest = self._cut(b, size_a, place)
                right.append(rest)
            self.unify(a, b, place)

    def _split_factor(self, atom: Atom, fast: Atom, place: str) -> Dim | None:
        """Learns that `atom` is a product whose fastest factor is `fast`; returns the slow rest, None if it cannot be."""
        quotient = atom.size.divided_by(fast.size)
        if quotient is None or atom.size.coefficient == 0:  # nothing times anything is nothing: no factors to learn
            return None
        if atom.parts is None:
            rest = self.fresh(quotient)
        else:
            cuts = [size_of(part).divided_by(fast.size) for part in atom.parts]
            if any(cut is None for cut in cuts):
                return None
            slow = [self.fresh(cut) for cut in cuts if cut is not None]
            for part, piece in zip(atom.parts, slow, strict=True):
                self.unify(part, (*piece, fast), place)
            rest = self.cat(slow)
            atom.parts = None
        atom.factors = (*rest, self.find(fast))
        return rest

    # -- views --------------------------------------------------------------------------------------------------------

    def reshape(self, dims: Sequence[Dim], sizes: Sequence[Size], place: str) -> list[Dim]:
        """Allots the atoms of `dims` to dimensions of the given `sizes`, splitting atoms where a boundary needs it."""
        atoms = [atom for dim in dims for atom in self.flat(dim)]
        result: list[Dim] = []
        for target in reversed(sizes):
            taken: list[Atom] = []
            missing = target
            while not missing.is_one:
                if not atoms:
                    return self._reshape_failed(dims, sizes, place)
                atom = self.find(atoms.pop())
                if atom.factors is not None:
                    atoms += self.flat((atom,))
                    continue
                rest = missing.divided_by(atom.size)
                if rest is not None:
                    taken.insert(0, atom)
                    missing = rest
                    continue
                if atom.size.divided_by(missing) is None:
                    return self._reshape_failed(dims, sizes, place)
                (fast,) = self.fresh(missing)
                slow = self._split_factor(atom, fast, place)
                if slow is None:
                    return self._reshape_failed(dims, sizes, place)
                atoms += slow
                taken.insert(0, fast)
                missing = ONE
            result.insert(0, tuple(taken))
        return result if not atoms else self._reshape_failed(dims, sizes, place)

    def _reshape_failed(self, dims: Sequence[Dim], sizes: Sequence[Size], place: str) -> list[Dim]:
        wanted = " x ".join(str(size) for size in sizes)
        reason = f"a view to {wanted} cuts across an axis"
        result = [self.fresh(size) for size in sizes]
        for dim in (*dims, *result):
            self.pin(dim, reason, place)
        return result

    # -- slices -------------------------------------------------------------------------------------------------------

    def slice(self, dim: Dim, start: int, stop: int, place: str) -> Dim:
        """The piece [start, stop) of a dimension whose size is an integer."""
        if start == stop:
            return self.fresh(Size(0))
        total = size_of(dim).coefficient
        rest = dim
        if stop < total:
            rest, _ = self._cut(rest, stop, place)
        if start > 0:
            _, rest = self._cut(rest, start, place)
        return rest

    def interleaved(self, dim: Dim, step: int, place: str) -> tuple[Dim, Dim]:
        """Splits a dimension read with a stride that divides its size into (slow, fast); the fast factor, the stride,
        is pinned."""
        quotient = size_of(dim).divided_by(Size(step))
        assert quotient is not None, f"step {step} does not divide {size_of(dim)}"
        slow, fast = self.fresh(quotient), self.fresh(Size(step))
        self.pin(fast, f"read with step {step}", place)
        self.unify(dim, (*slow, *fast), place)
        return slow, fast

    def _cut(self, dim: Dim, offset: int, place: str) -> tuple[Dim, Dim]:
        """The two pieces of a dimension before and after `offset` (0 < offset < size), which it learns to be made of."""
        first, *rest = self.flat(dim)
        inner = size_of(rest).coefficient
        if offset % inner:
            pieces = self.fresh(Size(offset)), self.fresh(Size(size_of(dim).coefficient - offset))
            for piece in (dim, *pieces):
                self.pin(piece, f"cut at {offset}, which is inside one of its repeats", place)
            return pieces
        left, right = self._cut_atom(first, offset // inner, place)
        return (*left, *rest), (*right, *rest)

    def _cut_atom(self, atom: Atom, offset: int, place: str) -> tuple[Dim, Dim]:
        if atom.parts is None:
            atom.parts = (self.fresh(Size(offset)), self.fresh(Size(atom.size.coefficient - offset)))
            return atom.parts[0], atom.parts[1]
        before: list[Dim] = []
        after: list[Dim] = []
        position = 0
        for part in atom.parts:
            size = size_of(part).coefficient
            if position + size <= offset:
                before.append(part)
            elif position >= offset:
                after.append(part)
            else:
                left, right = self._cut(part, offset - position, place)
                before.append(left)
                after.append(right)
            position += size
        atom.parts = (*before, *after)
        return self.cat(before), self.cat(after)
