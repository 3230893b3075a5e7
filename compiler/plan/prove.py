"""The proof that a configuration of the student has the planned shapes and constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import FIXED_LENGTH, Captured, capture
from minitron.compiler.capture.layer_config import lists_over_layers
from minitron.compiler.importance.select import leading, narrowing_of
from minitron.compiler.rewrite.scale_repair import check_scalars
from minitron.compiler.roles.roles import Roles
from minitron.compiler.roles.widths import teacher_widths
from minitron.compiler.student.config import Key, fit, student_config
from minitron.compiler.student.constraints import check_rows
from minitron.compiler.student.targets import Targets, following
from minitron.compiler.weights.recipes import recipes
from minitron.specs.errors import SpecInvalid, UsageError
from minitron.specs.load import LoadedSpec


def proved(
    loaded: LoadedSpec, captured: Captured, table: AxisTable, roles: Roles, targets: Targets, layers: Sequence[int]
) -> tuple[Targets, Any, torch.nn.Module]:
    """The targets as asked for, or with what has to follow them, and the student that these describe."""
    try:
        return targets, *prove(captured, table, roles, targets, layers)
    except UsageError as error:
        widths, first = teacher_widths(captured, roles, table), error
    for followed in following(targets, widths):
        try:
            config, model = prove(captured, table, roles, followed, layers)
        except UsageError:
            continue
        if wrong := check_rows(followed.widths, widths, captured, roles, loaded.error):
            raise SpecInvalid(wrong)
        return followed, config, model
    raise first


def prove(
    captured: Captured, table: AxisTable, roles: Roles, targets: Targets, layers: Sequence[int]
) -> tuple[Any, torch.nn.Module]:
    selection = leading(targets, roles, layers)
    narrowing = narrowing_of(selection, roles, table)
    made = recipes(captured, table.parameters, narrowing, selection.layers)
    shapes = {
        name: tuple(narrowing.count(dim) for dim in table.parameters[recipe.source]) for name, recipe in made.items()
    }
    widths = teacher_widths(captured, roles, table)
    also, config, model = fit(captured, targets.widths, widths, selection.layers, shapes)
    if targets.widths or len(selection.layers) != captured.layer_count:
        compare_constants(captured, targets, widths, selection.layers, also)
    return config, model


def compare_constants(
    captured: Captured,
    targets: Targets,
    widths: Mapping[str, int],
    kept: Sequence[int],
    also: Mapping[Key, int],
) -> None:
    """Compares the numbers in the graphs of teacher and student, on a few layers of each kind: all of them take long."""
    few = representatives(captured, kept)
    length = captured.length or FIXED_LENGTH
    narrowed = capture(student_config(captured, targets.widths, widths, few, also), captured.dtype, length)
    if len(few) == captured.layer_count:
        check_scalars(captured, narrowed, {layer: layer for layer in few})
        return
    whole = capture(student_config(captured, {}, widths, few), captured.dtype, length)
    check_scalars(whole, narrowed, {layer: layer for layer in range(len(few))})


def representatives(captured: Captured, kept: Sequence[int]) -> list[int]:
    """Of the kept layers, the first two of each kind: by the configuration's lists over layers, and by their parameters."""
    lists = list(lists_over_layers(captured.config, captured.layer_count).values())
    parameters: dict[int | None, list[str]] = {}
    for name, value in captured.model.named_parameters():
        layer = captured.layer_in_path(name)
        own = name.removeprefix(f"{captured.layer_path}.{layer}.")
        parameters.setdefault(layer, []).append(f"{own} {tuple(value.shape)}")
    seen: dict[str, int] = {}
    chosen = []
    for layer in kept:
        kind = repr([value[layer] for value in lists]) + repr(parameters[layer])
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            chosen.append(layer)
    return chosen
