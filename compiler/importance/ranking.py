"""Scores that rank nothing: where all of an axis are equal, the first indices would stay, whatever the teacher is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from minitron.compiler.importance.scores import ScoreTable, WidthConfig
from minitron.compiler.importance.select import Selection, kept_experts
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS, NUM_EXPERTS
from minitron.compiler.roles.roles import Roles
from minitron.compiler.student.targets import Targets
from minitron.specs.errors import Problem

Numbers = npt.NDArray[np.float32]


def equal_scores(
    scores: ScoreTable, targets: Targets, selection: Selection, config: WidthConfig, layer_count: int
) -> list[Problem]:
    """A problem for the first narrowed axis, of those that scores decide, whose scores are all equal in a kept layer."""
    for axis, layer, values in _ranked(scores, targets, selection, layer_count):
        if values.size > 1 and float(values.min()) == float(values.max()):
            where = axis if layer is None else f"{axis} in layer {layer}"
            message = f"the scores of {where} are all {float(values.flat[0]):g}, so they rank nothing"
            if axis == LAYERS:
                return [Problem("importance.depth", message, "name the layers (student.layers), or give other data")]
            return [Problem("importance.width", message, _remedy(axis, config))]
    return []


def _remedy(axis: str, config: WidthConfig) -> str:
    spread = [name for name, how in (("batch", config.batch), ("sequence", config.sequence)) if how == "var"]
    if spread and axis != NUM_EXPERTS:
        others = " and ".join(f"{name}: {'l2' if name == 'batch' else 'mean'}" for name in spread)
        return f"a variance over equal values, or over one alone, is 0; write {others}, or give more data"
    return "give other data (importance.data), on which its activations differ, or leave the axis out"


def _ranked(
    scores: ScoreTable, targets: Targets, selection: Selection, layer_count: int
) -> Iterator[tuple[str, int | None, Numbers]]:
    """Axis, layer and scores of everything that scores decide."""
    if targets.rank_layers(layer_count) and scores.layers is not None:
        yield LAYERS, None, scores.layers
    if selection.hidden is not None and scores.hidden is not None:
        yield HIDDEN, None, scores.hidden
    for layer in selection.groups:
        if layer in scores.heads:
            yield HEADS if HEADS in targets.widths else GROUPS, layer, scores.heads[layer]
    for axis, of_layer in selection.widths.items():
        for layer in of_layer:
            if layer in scores.widths.get(axis, {}):
                yield axis, layer, scores.widths[axis][layer]


def unreached_experts(scores: ScoreTable, selection: Selection, roles: Roles) -> str | None:
    """A sentence on kept experts whose own channels nothing ranks: no calibration token is sent to them."""
    found: dict[str, list[int]] = {}
    for axis, of_layer in selection.widths.items():
        for layer in of_layer:
            width, mixture = roles.widths[axis][layer], roles.mixtures.get(layer)
            rows = scores.widths.get(axis, {}).get(layer)
            if mixture is None or rows is None or width.parents != mixture.experts:
                continue
            kept = kept_experts(selection, roles, layer, len(rows))
            unknown = [expert for expert in kept if rows.shape[-1] > 1 and not rows[expert].any()]
            if unknown:
                found.setdefault(f"{axis} in layer {layer}", unknown)
    if not found:
        return None
    where, experts = next(iter(found.items()))
    more = f", and in {len(found) - 1} other layers" if len(found) > 1 else ""
    return (
        f"{where}: no calibration token is sent to {len(experts)} of the kept experts (the first is {experts[0]}){more}; "
        "of their channels the first ones stay. More calibration data may reach them (importance.data)"
    )
