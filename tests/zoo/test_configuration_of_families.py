"""The `configuration` check raises no alarm at any family's student: each axis alone, and a layer dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.compiler.capture.capture import capture
from minitron.compiler.compile import config_widths
from minitron.compiler.emit.older_loaders import for_older_loaders
from minitron.compiler.importance.select import leading, narrowing_of
from minitron.compiler.roles.analysed import AnalysedTeacher, analyse_teacher
from minitron.compiler.student.config import fit
from minitron.compiler.student.targets import Targets, following, resolve_targets
from minitron.compiler.verify.configuration import Planned, first_other_key
from minitron.compiler.weights.recipes import recipes
from minitron.specs.blocks.student import Student
from minitron.specs.errors import UsageError
from tests.zoo.configs import EVERY, config_of


def students(teacher: AnalysedTeacher) -> Iterator[tuple[Targets, tuple[int, ...], Any, Any]]:
    """Every axis that can be narrowed, alone and to its half; then without a layer."""
    count = teacher.captured.layer_count
    asked: list[dict[str, Any]] = [
        {axis: width // 2} for axis, width in teacher.widths.items() if width > 1 and axis in Student.model_fields
    ]
    asked += [{"layers": {"drop": [gone]}} for gone in (0, 1) if count > 1]
    for keys in asked:
        first, _ = resolve_targets(Student.model_validate(keys), teacher)
        if first is None:
            continue
        for targets in (first, *following(first, teacher.widths)):
            selection = leading(targets, teacher.roles, targets.named_layers or tuple(range(count)))
            narrowing = narrowing_of(selection, teacher.roles, teacher.table)
            parameters = teacher.table.parameters
            made = recipes(teacher.captured, parameters, narrowing, selection.layers)
            shapes = {
                name: tuple(narrowing.count(dim) for dim in parameters[recipe.source]) for name, recipe in made.items()
            }
            try:
                _, config, model = fit(teacher, targets.widths, selection.layers, shapes)
            except UsageError:
                continue
            yield targets, selection.layers, config, model
            break


def written(folder: Path, config: Any, model: Any) -> Path:
    """config.json as a compile writes it."""
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(for_older_loaders(config, json.loads(path.read_text()))))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_no_key_of_a_right_student_is_told(family: str, tmp_path: Path) -> None:
    try:
        teacher = analyse_teacher(capture(config_of(family), torch.float32))
    except UsageError as error:
        pytest.skip(str(error))
    found = 0
    for number, (targets, layers, config, model) in enumerate(students(teacher)):
        planned = Planned(teacher.captured, config, model, layers, config_widths(teacher, targets, config))
        folder = written(tmp_path / str(number), config, model)
        assert first_other_key(folder, planned) is None, (targets.widths, layers)
        found += 1
    assert found
