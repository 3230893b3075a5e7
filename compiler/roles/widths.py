"""The teacher's width of every named axis, and the leaves that a name stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minitron.compiler.axes.dims import Atom, size_of
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.roles.names import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
)
from minitron.compiler.roles.roles import Heads, Roles


def teacher_widths(captured: Captured, roles: Roles, table: AxisTable) -> dict[str, int]:
    """Maps the name of every axis of the teacher to its width. An axis that differs from layer to layer has its largest
    width here."""
    widths = {HIDDEN: roles.hidden.size}
    for name, layers in roles.widths.items():
        widths[name] = max(width.size for width in layers.values())
    if roles.heads:
        sites = list(roles.heads.values())
        widths[HEADS] = max(site.groups * site.repeats for site in sites)
        widths[GROUPS] = max(site.groups for site in sites)
        widths[HEAD_DIM] = size_of(sites[0].value).coefficient
    widths[LAYERS] = captured.layer_count
    return widths


def uniform(values: Iterable[Any]) -> bool:
    return len(set(values)) <= 1


def leaves_of(name: str, roles: Roles, table: AxisTable) -> list[Atom]:
    """The leaves that an axis name stands for, over all layers."""
    if name == HIDDEN:
        return [roles.hidden.leaf]
    if name == GROUPS:
        return [site.group for site in roles.heads.values() if site.group is not None]
    if name == HEADS:
        return [site.repeat or site.group for site in roles.heads.values() if (site.repeat or site.group) is not None]  # type: ignore[misc]
    if name == HEAD_DIM:
        return sorted(
            {leaf for site in roles.heads.values() for leaf in _head_leaves(site, table)}, key=lambda a: a.number
        )
    return [width.leaf for width in roles.widths.get(name, {}).values()]


def _head_leaves(site: Heads, table: AxisTable) -> set[Atom]:
    """The width of a value, and whatever else stands in one product with the heads: the width of queries and keys."""
    own = {atom for atom in (site.group, site.repeat) if atom is not None}
    result = set(table.space.leaves(site.value))
    for dims in table.parameters.values():
        for dim in dims:
            for path in table.space.ways(dim):
                if own and own <= path:
                    result |= path - own
    return result
