"""The indices that a plan.json says are kept, as flags over the dimensions of the teacher's parameters.

Another way to the same lists than `axes/narrowing.py`, for the checks: flags are read off the document alone, and a position of
a dimension is kept where the coordinates that it is made of are all kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from minitron.compiler.axes.dims import Atom, Dim, Dims, Space, size_of
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS, NUM_EXPERTS, SCAN_HEAD_DIM, SCAN_HEADS
from minitron.compiler.roles.roles import Heads, Roles, Width

Flags = npt.NDArray[np.bool_]
Lists = Sequence[Sequence[int]]
# What two leaves are to each other: the one whose lists differ with the index of the other.
OWNERS = {SCAN_HEAD_DIM: SCAN_HEADS}


class WrongSelection(ValueError):
    """A selection that no build can have, in words."""


@dataclass(frozen=True)
class Kept:
    """The flags of one leaf: [size], or [sizes of its parents, size] where they differ with the parents' index."""

    parents: Dim
    flags: Flags


def kept_leaves(selection: Mapping[str, Lists], roles: Roles, find: Callable[[Atom], Atom]) -> dict[Atom, Kept]:
    """The flags of every leaf that a selection names, by what `find` makes of the leaf (`Space.find`).

    WrongSelection where its lists are not those of the axes.
    """
    (layers,) = selection[LAYERS]
    result: dict[Atom, Kept] = {}
    if HIDDEN in selection:
        leaf = roles.hidden.leaf
        result[find(leaf)] = Kept((), flags_of(selection[HIDDEN][0], leaf.size.coefficient, HIDDEN))
    for name, lists in selection.items():
        if name in (LAYERS, HIDDEN, GROUPS, HEADS):
            continue
        rest = iter(lists)
        for layer in (i for i in layers if i in roles.widths[name]):
            width = roles.widths[name][layer]
            result[find(width.leaf)] = _width(name, layer, width, rest, selection, roles)
        _ended(rest, name)
    for layer, groups, heads in _heads(selection, [i for i in layers if i in roles.heads]):
        result |= {find(atom): kept for atom, kept in _attention(roles.heads[layer], groups, heads, layer)}
    return result


def flags_of(indices: Sequence[int], size: int, name: str) -> Flags:
    """The flags of one list. WrongSelection unless it is ascending and inside the axis."""
    if any(a >= b for a, b in pairwise(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
        raise WrongSelection(f"the indices of {name} are not ascending ones below {size}: {list(indices)[:8]}")
    flags = np.zeros(size, dtype=bool)
    flags[list(indices)] = True
    return flags


def _width(
    name: str, layer: int, width: Width, rest: Iterator[Sequence[int]], selection: Mapping[str, Lists], roles: Roles
) -> Kept:
    """The flags of one width in one layer: one list, or one for each kept index of what owns it."""
    where, size = f"{name} in layer {layer}", width.leaf.size.coefficient
    if not width.parents:
        return Kept((), flags_of(_next(rest, name), size, where))
    shape = [parent.size.coefficient for parent in width.parents]
    if width.together > 1:  # one list, of numbers in all groups
        return Kept(width.parents, flags_of(_next(rest, name), size * width.together, where).reshape(*shape, size))
    owner, flags = OWNERS.get(name, NUM_EXPERTS), np.zeros((int(np.prod(shape)), size), dtype=bool)
    kept: Sequence[int] = range(len(flags))
    if owner in selection:
        kept = selection[owner][[i for i in selection[LAYERS][0] if i in roles.widths[owner]].index(layer)]
    for index in kept:
        flags[index] = flags_of(_next(rest, name), size, where)
    return Kept(width.parents, flags.reshape(*shape, size))


def _heads(selection: Mapping[str, Lists], layers: Sequence[int]) -> Iterator[tuple[int, Sequence[int], Sequence[int]]]:
    if HEADS not in selection:
        return
    groups, heads = iter(selection[GROUPS]), iter(selection[HEADS])
    for layer in layers:
        yield layer, _next(groups, GROUPS), _next(heads, HEADS)
    _ended(groups, GROUPS)
    _ended(heads, HEADS)


def _attention(site: Heads, groups: Sequence[int], heads: Sequence[int], layer: int) -> Iterator[tuple[Atom, Kept]]:
    """The flags of groups, and those of the query heads within each."""
    of_heads = flags_of(heads, site.groups * site.repeats, f"{HEADS} in layer {layer}").reshape(
        site.groups, site.repeats
    )
    of_groups = flags_of(groups, site.groups, f"{GROUPS} in layer {layer}")
    if (of_heads.any(1) != of_groups).any():
        raise WrongSelection(f"the query heads kept in layer {layer} are not of the key-value groups kept there")
    if site.group is not None:
        yield site.group, Kept((), of_groups)
    if site.repeat is not None:
        yield site.repeat, Kept((), of_heads[0]) if site.group is None else Kept((site.group,), of_heads)


def _next(rest: Iterator[Sequence[int]], name: str) -> Sequence[int]:
    found = next(rest, None)
    if found is None:
        raise WrongSelection(f"{name} has too few lists")
    return found


def _ended(rest: Iterator[Sequence[int]], name: str) -> None:
    if next(rest, None) is not None:
        raise WrongSelection(f"{name} has too many lists")


def coordinates(space: Space, dim: Dim) -> dict[Atom, npt.NDArray[np.int64]]:
    """Leaf -> the index along it of every position of a dimension, -1 where the leaf is not part of that position."""
    atoms = space.flat(dim)
    sizes = [atom.size.coefficient for atom in atoms]
    places = np.unravel_index(np.arange(int(np.prod(sizes))), sizes) if sizes else ()
    result: dict[Atom, npt.NDArray[np.int64]] = {}
    for atom, place in zip(atoms, places, strict=True):
        if atom.parts is None:
            result[atom] = place
            continue
        offset = 0
        for part in atom.parts:
            size = size_of(part).coefficient
            inside = (place >= offset) & (place < offset + size)
            for leaf, index in coordinates(space, part).items():
                found = result.setdefault(leaf, np.full(place.shape, -1, dtype=np.int64))
                found[inside] = index[place[inside] - offset]
            offset += size
    return result


def flags_over(space: Space, dims: Dims, kept: Mapping[Atom, Kept]) -> list[Flags]:
    """Flags that broadcast to a parameter of these dimensions: an element is kept where all of them say so."""
    at = [coordinates(space, dim) for dim in dims]
    result: list[Flags] = []

    def along(axis: int, atom: Atom) -> npt.NDArray[np.int64]:
        return at[axis][atom].reshape([-1 if i == axis else 1 for i in range(len(dims))])

    for axis, leaves in enumerate(at):
        for leaf in leaves:
            if leaf not in kept:
                continue
            index = []
            for parent in map(space.find, kept[leaf].parents):
                owner = axis if parent in leaves else next(i for i, other in enumerate(at) if parent in other)
                index.append(along(owner, parent))
            own = along(axis, leaf)
            result.append(kept[leaf].flags[(*index, own)] | (own < 0))
    return result
