"""The proof that a configuration of the student has the planned shapes and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from minitron.compiler.capture import capture
from minitron.compiler.capture.capture import FIXED_LENGTH, Captured
from minitron.compiler.capture.layer_lists import kinds_by_lists, some_of_each_kind
from minitron.compiler.importance.select import leading, narrowing_of
from minitron.compiler.plan.cached_step import check_cached_step
from minitron.compiler.rewrite.scale_repair import check_scalars
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.student.config import Key, fit, student_config
from minitron.compiler.student.constraints import check_rows
from minitron.compiler.student.targets import Targets, following
from minitron.compiler.weights.recipes import recipes
from minitron.specs.errors import Refused, UsageError

Proof = Callable[[AnalysedTeacher, Targets, Sequence[int]], tuple[Any, torch.nn.Module]]


def proved(
    teacher: AnalysedTeacher, targets: Targets, layers: Sequence[int], proof: Proof | None = None
) -> tuple[Targets, Any, torch.nn.Module]:
    """Returns the targets as asked for, or with the axes that have to follow them, and the student that these
    describe by `proof`, which is `prove` where none is given."""
    proof = proof or prove
    try:
        return targets, *proof(teacher, targets, layers)
    except UsageError as error:
        first = error
    for followed in following(targets, teacher.widths):
        try:
            config, model = proof(teacher, followed, layers)
        except UsageError:
            continue
        if wrong := check_rows(followed.widths, teacher):
            raise Refused(wrong)
        return followed, config, model
    raise first


def prove(teacher: AnalysedTeacher, targets: Targets, layers: Sequence[int]) -> tuple[Any, torch.nn.Module]:
    """Returns the student's configuration and its model on the meta device. Raises UsageError where no configuration
    fits."""
    also, config, model = buildable(teacher, targets, layers)
    if targets.widths or len(layers) != teacher.captured.layer_count:
        compare_constants(teacher, targets, layers, also)
    return config, model


def buildable(
    teacher: AnalysedTeacher, targets: Targets, layers: Sequence[int]
) -> tuple[Mapping[Key, int], Any, torch.nn.Module]:
    """Proves shapes and a step of generation, as `prove` does; returns the further keys that `fit` found too."""
    also, config, model = _described(teacher, targets, layers)
    if targets.widths or len(layers) != teacher.captured.layer_count:
        check_cached_step(teacher.captured, config)
    return also, config, model


def describe(teacher: AnalysedTeacher, targets: Targets, layers: Sequence[int]) -> tuple[Any, torch.nn.Module]:
    """Proves shapes alone: the numbers in the student's graph, which takes an export, are not compared."""
    _, config, model = _described(teacher, targets, layers)
    return config, model


def _described(
    teacher: AnalysedTeacher, targets: Targets, layers: Sequence[int]
) -> tuple[Mapping[Key, int], Any, torch.nn.Module]:
    selection = leading(targets, teacher.roles, layers)
    narrowing = narrowing_of(selection, teacher.roles, teacher.table)
    made = recipes(teacher.captured, teacher.table.parameters, narrowing, selection.layers)
    shapes = {
        name: tuple(narrowing.count(dim) for dim in teacher.table.parameters[recipe.source])
        for name, recipe in made.items()
    }
    return fit(teacher, targets.widths, selection.layers, shapes)


def compare_constants(
    teacher: AnalysedTeacher,
    targets: Targets,
    kept: Sequence[int],
    also: Mapping[Key, int],
) -> None:
    """Compares the numbers in the graphs of teacher and student.

    Where layers are dropped, the student is captured as it will be: a number may follow the position of a layer or how many
    there are. Elsewhere a few layers of each kind stand for all of them, which take long.
    """
    if len(kept) < teacher.captured.layer_count:
        config = student_config(teacher, targets.widths, kept, also)
        student = capture.capture(config, teacher.captured.dtype, teacher.captured.length or FIXED_LENGTH)
        check_scalars(teacher.captured, student, {old: new for new, old in enumerate(kept)})
        return
    few = representatives(teacher.captured, kept)
    length = teacher.captured.length or FIXED_LENGTH
    narrowed = capture.capture(student_config(teacher, targets.widths, few, also), teacher.captured.dtype, length)
    if len(few) == teacher.captured.layer_count:
        check_scalars(teacher.captured, narrowed, {layer: layer for layer in few})
        return
    whole = capture.capture(student_config(teacher, {}, few), teacher.captured.dtype, length)
    check_scalars(whole, narrowed, {layer: layer for layer in range(len(few))})


def kinds_of_layers(captured: Captured) -> list[str]:
    """The kind of each layer, as the configuration's lists over layers and the parameters tell it."""
    parameters: dict[int | None, list[str]] = {}
    for name, value in captured.model.named_parameters():
        layer = captured.layer_in_path(name)
        own = name.removeprefix(f"{captured.layer_path}.{layer}.")
        parameters.setdefault(layer, []).append(f"{own} {tuple(value.shape)}")
    by_lists = kinds_by_lists(captured.config, captured.layer_count)
    return [kind + repr(parameters.get(layer)) for layer, kind in enumerate(by_lists)]


def representatives(captured: Captured, kept: Sequence[int]) -> list[int]:
    """The first two of each kind among the kept layers."""
    return some_of_each_kind(kinds_of_layers(captured), kept, 2)
