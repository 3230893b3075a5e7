"""Widths to begin with, for a budget of parameters: what `minitron init --teacher` writes.

Minitron's recipe (arXiv 2407.14679, section 4): prune width before depth, `hidden_size` and `intermediate_size` in the same
proportion. Parameters are counted from the shapes of the teacher's model with these two replaced wherever they occur; the
exact number is the plan's to say. Where a teacher does not allow both, one of them, and then the number of layers, is next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture.models import build_meta, stored_tensors
from minitron.compiler.roles.names import HIDDEN, INTERMEDIATE, LAYERS
from minitron.compiler.teacher.checkpoint import open_checkpoint
from minitron.specs.blocks.base import LONGEST_SEQUENCE
from minitron.specs.errors import UsageError
from minitron.specs.model_config import positions_of
from minitron.specs.units import default_multiple


@dataclass(frozen=True)
class Proposal:
    """The widths that a spec may start from, the best set first, and the longest sequence that the teacher reads."""

    teacher_parameters: int
    students: tuple[dict[str, int], ...]
    sequence_length: int


def propose(model: str, base: Path, *, parameters: int | None = None, share: Fraction | None = None) -> Proposal:
    """Reads a teacher's configuration (a folder relative to `base`, or a Hub id) and proposes students of a number of
    parameters, or of a share of the teacher's. Raises UsageError where there is no such model or the budget is out of
    reach."""
    config = open_checkpoint(model, None, base, weights=False).config
    shapes = [tuple(tensor.shape) for tensor in stored_tensors(build_meta(config, torch.float32, "eager")).values()]
    whole = sum(map(_size, shapes))
    budget = parameters if parameters is not None else int((share or Fraction(1, 2)) * whole)
    if budget >= whole:
        raise UsageError(f"the teacher has {whole:,} parameters, and the student shall have {budget:,}; ask for fewer")
    students = tuple(_students(config, shapes, budget))
    if not students:
        raise UsageError("no width of this teacher can be smaller; `minitron init` shows how a spec is written by hand")
    return Proposal(whole, students, min(LONGEST_SEQUENCE, positions_of(config) or LONGEST_SEQUENCE))


def _students(config: Any, shapes: list[tuple[int, ...]], budget: int) -> Iterator[dict[str, int]]:
    hidden, inner = (getattr(config, key, None) for key in (HIDDEN, INTERMEDIATE))
    widths = {key: value for key, value in ((HIDDEN, hidden), (INTERMEDIATE, inner)) if isinstance(value, int)}
    for keys in ((HIDDEN, INTERMEDIATE), (INTERMEDIATE,), (HIDDEN,)):
        if widths.keys() >= set(keys):
            teacher = {key: widths[key] for key in keys}
            smaller = list(_scaled(teacher))
            if smaller:
                yield min(smaller, key=_distance(shapes, teacher, budget))
    layers = int(config.num_hidden_layers)
    if layers > 1:
        yield {LAYERS: max(1, min(layers - 1, layers * budget // sum(map(_size, shapes))))}


def _scaled(teacher: dict[str, int]) -> Iterator[dict[str, int]]:
    """All widths in the proportion of the teacher's, in multiples that serve well; the first width sets the pace."""
    (lead, width), *_ = teacher.items()
    step = default_multiple(width)
    for kept in range(step, width, step):
        student = {lead: kept}
        for key, other in list(teacher.items())[1:]:
            multiple = default_multiple(other)
            student[key] = max(multiple, other * kept // width // multiple * multiple)
        yield student


def _distance(shapes: list[tuple[int, ...]], teacher: dict[str, int], budget: int) -> Callable[[dict[str, int]], int]:
    """Returns a function that measures a student's distance from the budget. A dimension that is a width of the
    teacher, or twice one (gate and up in one matrix), becomes the student's."""

    def distance(student: dict[str, int]) -> int:
        new = {2 * teacher[key]: 2 * student[key] for key in student} | {teacher[key]: student[key] for key in student}
        return abs(sum(_size(tuple(new.get(size, size) for size in shape)) for shape in shapes) - budget)

    return distance


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
