"""Targets: what the spec asks for, resolved against what the teacher has. Every width that cannot be is an error here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import (
    CONVOLVED,
    COUNTS,
    FEED_FORWARD,
    HIDDEN,
    LAYERS,
)
from minitron.compiler.student.constraints import (
    check_experts,
    check_heads,
    check_rows,
    check_scan_heads,
    check_shared,
)
from minitron.compiler.student.status import AxisStatus, status_of
from minitron.specs.blocks.student import Student
from minitron.specs.errors import Problem
from minitron.specs.units import Share, Span, default_multiple


@dataclass(frozen=True)
class Targets:
    """`widths`: the narrowed axes by name; `layers`: how many stay; `named_layers`: which, where the spec says so."""

    widths: Mapping[str, int]
    layers: int
    named_layers: tuple[int, ...] | None
    statuses: tuple[AxisStatus, ...]

    def rank_layers(self, layer_count: int) -> bool:
        """Checks whether scores decide which of the teacher's `layer_count` layers stay."""
        return self.named_layers is None and self.layers < layer_count


def resolve_targets(student: Student, teacher: AnalysedTeacher) -> tuple[Targets | None, list[Problem]]:
    """The targets of `student`, the block of a spec; or None with all problems, their paths those of the spec."""
    widest = teacher.widths
    errors: list[Problem] = []
    wanted: dict[str, int] = {}
    for key, value in student.targets():
        path = f"student.{key}"
        if key not in widest:
            errors.append(
                Problem(path, f"the teacher ({teacher.captured.config.model_type}) has no {key}", "leave it out")
            )
            continue
        # A search has several candidates.
        ends = (value.least, value.most) if isinstance(value, Span) else (value,)
        values = value if isinstance(value, tuple) else ends
        for index, one in enumerate(values):
            here = f"{path}.{index}" if isinstance(value, tuple) else path
            width = _width(key, one, widest[key], student.multiple_of)
            if not 0 < width <= widest[key]:
                message = f"{width} is not between 1 and the teacher's {widest[key]}"
                hint = f"write at most {widest[key]}" if width > 0 else "write a larger share, or a number"
                errors.append(Problem(here, message, hint))
                continue
            status, reason = status_of(key, teacher)
            if width < widest[key] and status == "refused":
                errors.append(Problem(here, f"cannot be narrowed: {reason}", f"leave it out, or write {widest[key]}"))
            elif len(values) == 1:
                wanted[key] = width
    shares = {key for key, value in student.targets() if isinstance(value, Share)}
    errors += check_heads(wanted, widest, shares)
    errors += check_experts(wanted, teacher.roles, shares)
    errors += check_scan_heads(wanted, teacher.roles, shares)
    errors += check_rows(wanted, teacher)
    errors += check_shared(wanted, teacher, shares)
    layers, named = _layers(student, teacher.captured.layer_count, wanted, errors)
    if errors:
        return None, errors
    widths = {key: width for key, width in wanted.items() if key != LAYERS and width < widest[key]}
    statuses = tuple(
        AxisStatus(
            name,
            widest[name],
            layers if name == LAYERS else widths.get(name, widest[name]),
            *status_of(name, teacher),
        )
        for name in widest
    )
    return Targets(widths, layers, named, statuses), []


def following(targets: Targets, teacher: Mapping[str, int]) -> Iterator[Targets]:
    """The targets with axes that follow others, where the configuration may have one key for both; the shapes decide.

    What a mixer convolves follows hidden_size in proportion; widths of feed-forward layers and of experts that are the same
    in the teacher follow one another. One kind at a time first, then all that there are.
    """
    found: list[tuple[str, str, int]] = []
    hidden = targets.widths.get(HIDDEN)
    if hidden is not None and CONVOLVED in teacher:
        width, rest = divmod(teacher[CONVOLVED] * hidden, teacher[HIDDEN])
        if width and not rest:
            found.append((CONVOLVED, HIDDEN, width))
    for leader in FEED_FORWARD:
        if leader in targets.widths:
            found += [
                (name, leader, targets.widths[leader])
                for name in FEED_FORWARD
                if name not in targets.widths and teacher.get(name) == teacher[leader]
            ]
    for chosen in ([[one] for one in found] if len(found) > 1 else []) + ([found] if found else []):
        widths = dict(targets.widths)
        statuses = list(targets.statuses)
        for name, leader, width in chosen:
            widths[name] = width
            statuses = [
                replace(one, student=width, reason=f"follows {leader}: {one.reason}") if one.axis == name else one
                for one in statuses
            ]
        if all(status.status != "refused" for status in statuses if status.axis in widths):
            yield replace(targets, widths=widths, statuses=tuple(statuses))


def _width(key: str, value: Any, teacher: int, multiple_of: int | None) -> int:
    """Resolves a width: a number stays as written; a share of a width is rounded down to a multiple, of a count to an
    integer."""
    if not isinstance(value, Share):
        return int(value)
    return value.of(teacher, 1 if key in COUNTS else multiple_of or default_multiple(teacher))


def _layers(
    student: Any, count: int, wanted: dict[str, int], errors: list[Problem]
) -> tuple[int, tuple[int, ...] | None]:
    named = student.layers
    if named is None:
        return wanted.get(LAYERS, count), None
    key = "drop" if named.drop is not None else "keep"
    numbers = named.drop if named.drop is not None else named.keep
    path = f"student.layers.{key}"
    if any(n >= count for n in numbers):
        errors.append(Problem(path, f"layer {max(numbers)} does not exist", f"the teacher has layers 0 to {count - 1}"))
        return count, None
    kept = tuple(i for i in range(count) if (i in set(numbers)) == (key == "keep"))
    if not kept:
        errors.append(Problem(path, "no layer would be left", "keep at least one"))
        return count, None
    return len(kept), kept
