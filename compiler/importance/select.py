"""Selection: from scores to index lists.

    hidden     one list for the network
    widths     one list a layer; of experts' channels, one for each expert (no other expert depends on them), and so with
               the heads of a scan in each group, and the channels of each of those heads
    groups     one list a layer: the key-value groups with the highest scores (a group's score: L2 over its query heads, those
               of all layers that read the same keys and values)
    heads      one list for each kept group: the query heads with the highest scores in that group
    layers     those that the spec names, or the highest-scored ones, or all but one run of neighbours

Of equal scores the lower index stays, so that a selection is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.compiler.axes.narrowing import Dependent, Indices, Narrowing
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS, NUM_EXPERTS, SCAN_HEAD_DIM, SCAN_HEADS
from minitron.compiler.roles.roles import Heads, Roles
from minitron.compiler.student.targets import Targets


@dataclass(frozen=True)
class Selection:
    """The kept indices, in the teacher's numbering. Lists of dropped layers and of axes that stay whole are left out.

    `heads`: layer -> one list of repeats (0 .. repeats-1) for each kept group, in the order of `groups`.
    """

    layers: tuple[int, ...]
    hidden: Indices | None = None
    widths: Mapping[str, Mapping[int, Indices]] = field(default_factory=dict)
    groups: Mapping[int, Indices] = field(default_factory=dict)
    heads: Mapping[int, tuple[Indices, ...]] = field(default_factory=dict)


def top(scores: npt.NDArray[np.float32], count: int) -> Indices:
    """The `count` highest-scored indices, ascending; of equal scores the lower index."""
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:count]).astype(np.int64)


def weakest_run(scores: npt.NDArray[np.float32], length: int) -> list[int]:
    """The neighbouring indices with the lowest sum of scores."""
    sums = np.convolve(scores.astype(np.float64), np.ones(length), mode="valid")
    start = int(np.argmin(sums))
    return list(range(start, start + length))


# parameters: the last is a choice that was made already
def select(
    targets: Targets,
    roles: Roles,
    scores: ScoreTable,
    layer_count: int,
    *,
    contiguous: bool,
    layers: tuple[int, ...] | None = None,
) -> Selection:
    """The highest-scored indices of every narrowed axis; `layers` stay where they are given."""
    layers = layers or _layers(targets, scores, layer_count, contiguous)
    hidden = None
    if HIDDEN in targets.widths:
        assert scores.hidden is not None
        hidden = top(scores.hidden, targets.widths[HIDDEN])
    widths = {
        name: {
            i: select_width(of_layer[i], targets.widths[name] // roles.widths[name][i].together)
            for i in layers
            if i in of_layer
        }
        for name, of_layer in scores.widths.items()
        if name in targets.widths
    }
    groups: dict[int, Indices] = {}
    heads: dict[int, tuple[Indices, ...]] = {}
    if HEADS in targets.widths or GROUPS in targets.widths:
        for layer in layers:
            if layer in roles.heads:
                together = [scores.heads[other] for other in roles.sharing(layer) if other in layers]
                groups[layer], heads[layer] = select_heads(
                    scores.heads[layer], *wanted_heads(targets, roles.heads[layer]), together
                )
    return Selection(layers, hidden, widths, groups, heads)


def select_width(scores: npt.NDArray[np.float32], count: int) -> Indices:
    """Selects the best indices of an axis; with scores [parents, width], separately for each index of the parents."""
    return top(scores, count) if scores.ndim == 1 else np.stack([top(row, count) for row in scores])


def wanted_heads(targets: Targets, site: Heads) -> tuple[int, int]:
    """Returns the number of groups, and of query heads in each, that are left of one attention."""
    groups = targets.widths.get(GROUPS, site.groups)
    return groups, targets.widths.get(HEADS, groups * site.repeats) // groups


def select_heads(
    scores_GR: npt.NDArray[np.float32],
    groups: int,
    repeats: int,
    together: Sequence[npt.NDArray[np.float32]] = (),
) -> tuple[Indices, tuple[Indices, ...]]:
    """The best groups, and the best query heads within each. `together`: the scores of all layers that have these groups."""
    squares_G = sum(np.square(one.astype(np.float64)).sum(1) for one in together or [scores_GR])
    kept = top(np.sqrt(squares_G).astype(np.float32), groups)
    return kept, tuple(top(scores_GR[g], repeats) for g in kept)


def _layers(targets: Targets, scores: ScoreTable, count: int, contiguous: bool) -> tuple[int, ...]:
    if not targets.rank_layers(count):
        return targets.named_layers or tuple(range(count))
    assert scores.layers is not None
    if not contiguous:
        return tuple(int(i) for i in top(scores.layers, targets.layers))
    dropped = set(weakest_run(scores.layers, count - targets.layers))
    return tuple(i for i in range(count) if i not in dropped)


def leading(targets: Targets, roles: Roles, kept_layers: Sequence[int] | None = None) -> Selection:
    """Selects the first indices of every axis: a placeholder for a selection where only its sizes matter.

    `kept_layers` where it is known which they are, although the spec does not name them.
    """
    layers = tuple(kept_layers or targets.named_layers or range(targets.layers))

    def first(count: int) -> Indices:
        return np.arange(count, dtype=np.int64)

    groups: dict[int, Indices] = {}
    heads: dict[int, tuple[Indices, ...]] = {}
    if HEADS in targets.widths or GROUPS in targets.widths:
        for layer in layers:
            if layer in roles.heads:
                g, r = wanted_heads(targets, roles.heads[layer])
                groups[layer], heads[layer] = first(g), (first(r),) * g
    return Selection(
        layers,
        first(targets.widths[HIDDEN]) if HIDDEN in targets.widths else None,
        {
            name: {i: first(targets.widths[name] // of_layer[i].together) for i in layers if i in of_layer}
            for name, of_layer in roles.widths.items()
            if name in targets.widths
        },
        groups,
        heads,
    )


def kept_experts(selection: Selection, roles: Roles, layer: int, count: int) -> list[int]:
    """The numbers of the experts, of `count`, that stay in a layer."""
    chosen = selection.widths.get(NUM_EXPERTS, {}).get(layer)
    if chosen is None:
        return list(range(count))
    if chosen.ndim == 1:
        return [int(one) for one in chosen]
    size = roles.widths[NUM_EXPERTS][layer].leaf.size.coefficient
    return [group * size + int(one) for group, row in enumerate(chosen) for one in row]


def narrowing_of(selection: Selection, roles: Roles, table: AxisTable) -> Narrowing:
    """The index lists of every leaf."""
    kept: dict[Any, Indices] = {}
    dependent: dict[Any, Dependent] = {}
    if selection.hidden is not None:
        kept[roles.hidden.leaf] = selection.hidden
    for name, layers in selection.widths.items():
        for layer, indices in layers.items():
            width = roles.widths[name][layer]
            if indices.ndim == 1:
                kept[width.leaf] = indices
            elif indices.shape[1] < width.leaf.size.coefficient:
                dependent[width.leaf] = Dependent(width.parents, list(indices), indices.shape[1])
    for layer, groups in selection.groups.items():
        site, lists = roles.heads[layer], selection.heads[layer]
        if site.group is not None:
            kept[site.group] = groups
        if site.repeat is not None and site.group is None:
            kept[site.repeat] = lists[0]
        elif site.repeat is not None:
            assert site.group is not None
            of_group = {int(g): chosen for g, chosen in zip(groups, lists, strict=True)}
            # Lists of groups that are gone are never read.
            all_lists = [of_group.get(g, lists[0]) for g in range(site.groups)]
            dependent[site.repeat] = Dependent((site.group,), all_lists, len(lists[0]))
    whole = {leaf for leaf, indices in kept.items() if len(indices) == leaf.size.coefficient}
    return Narrowing(table.space, {leaf: indices for leaf, indices in kept.items() if leaf not in whole}, dependent)


def selection_json(selection: Selection, roles: Roles) -> dict[str, list[list[int]]]:
    """`selection` of the plan: axis -> one list of kept indices, or one for each kept layer.

    Channels that differ from expert to expert, or from head to head of a scan: one list for each that is kept.
    """
    result: dict[str, list[list[int]]] = {LAYERS: [list(selection.layers)]}
    if selection.hidden is not None:
        result[HIDDEN] = [selection.hidden.tolist()]
    for name, layers in selection.widths.items():
        result[name] = [row for i in sorted(layers) for row in _width_lists(name, i, layers[i], selection, roles)]
    if selection.groups:
        order: Sequence[int] = sorted(selection.groups)
        result[GROUPS] = [selection.groups[i].tolist() for i in order]
        result[HEADS] = [
            [
                int(g) * roles.heads[i].repeats + int(r)
                for g, rs in zip(selection.groups[i], selection.heads[i], strict=True)
                for r in rs
            ]
            for i in order
        ]
    return result


def _width_lists(name: str, layer: int, indices: Indices, selection: Selection, roles: Roles) -> list[list[int]]:
    """The lists of one layer: one, or one for each expert or head that is kept."""
    width = roles.widths[name][layer]
    if indices.ndim == 1:
        return [indices.tolist()]
    if width.together > 1:  # numbers in all groups
        each: list[int] = [g * width.leaf.size.coefficient + int(i) for g, row in enumerate(indices) for i in row]
        return [each]
    owner = SCAN_HEADS if name == SCAN_HEAD_DIM else NUM_EXPERTS
    kept = (
        _width_lists(owner, layer, selection.widths[owner][layer], selection, roles)[0]
        if (layer in selection.widths.get(owner, {}))
        else range(len(indices))
    )
    return [indices[one].tolist() for one in kept]
