"""Checks the constraints on a student's widths: heads in groups, routed experts, rows of grouped products, shared
experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import (
    GROUPS,
    HEADS,
    HIDDEN,
    NUM_EXPERTS,
    SCAN_HEADS,
    SHARED,
)
from minitron.compiler.roles.roles import Roles
from minitron.compiler.student.shared_experts import find_tie
from minitron.specs.errors import Problem

# torch.nn.functional.grouped_mm: "strides should be multiple of 16 bytes", on processors and on graphics cards.
GROUPED_ROW_BYTES = 16


def check_heads(wanted: dict[str, int], teacher: Mapping[str, int], shares: Collection[str]) -> list[Problem]:
    """Fills in what follows (a dropped group takes its query heads along) and checks that heads divide into groups.

    A count that was asked for as a share is rounded down to one that fits the other.
    """
    if HEADS not in teacher or not (HEADS in wanted or GROUPS in wanted):
        return []
    repeats = teacher[HEADS] // teacher[GROUPS]
    if GROUPS not in wanted:
        wanted[GROUPS] = wanted[HEADS] if repeats == 1 else teacher[GROUPS]
    if HEADS not in wanted:
        wanted[HEADS] = wanted[GROUPS] * repeats

    def fits(heads: int, groups: int) -> bool:
        return heads % groups == 0 and heads // groups <= repeats

    if HEADS in shares:
        wanted[HEADS] = next((n for n in range(wanted[HEADS], 0, -1) if fits(n, wanted[GROUPS])), wanted[HEADS])
    elif GROUPS in shares:
        wanted[GROUPS] = next((n for n in range(wanted[GROUPS], 0, -1) if fits(wanted[HEADS], n)), wanted[GROUPS])
    heads, groups = wanted[HEADS], wanted[GROUPS]
    path = f"student.{HEADS}"
    possible = [n * groups for n in range(1, repeats + 1)]
    if fits(heads, groups):
        return []
    if heads > possible[-1]:
        message = (
            f"{groups} key-value groups of this teacher have {possible[-1]} query heads, {repeats} each, not {heads}"
        )
    else:
        message = f"{heads} query heads do not divide into {groups} key-value groups"
    near = sorted(sorted(possible, key=lambda n: abs(n - heads))[:2])
    return [Problem(path, message, f"write {' or '.join(map(str, near))}, or change {GROUPS}")]


def check_experts(wanted: dict[str, int], roles: Roles, shares: Collection[str]) -> list[Problem]:
    """Checks that the router keeps at least as many experts as it picks. A share is rounded down to a multiple of its
    groups."""
    if NUM_EXPERTS not in wanted or not roles.mixtures:
        return []
    groups = max(mixture.groups for mixture in roles.mixtures.values())
    least = max(mixture.least for mixture in roles.mixtures.values())
    picked = max(mixture.picked for mixture in roles.mixtures.values())
    if NUM_EXPERTS in shares:
        wanted[NUM_EXPERTS] = max(least, wanted[NUM_EXPERTS] // groups * groups)
    count, path = wanted[NUM_EXPERTS], f"student.{NUM_EXPERTS}"
    if count % groups:
        near = sorted({max(least, n) for n in (count // groups * groups, (count // groups + 1) * groups)})
        message = f"{count} experts do not divide into the {groups} groups that the router picks from"
        return [Problem(path, message, f"write {' or '.join(map(str, near))}")]
    if count < least:
        message = f"{count} experts are fewer than the router needs: it sends every token to {picked}"
        if groups > 1:
            message += f", and picks among {groups} groups of experts first"
        return [Problem(path, message, f"write at least {least}")]
    return []


def check_scan_heads(wanted: dict[str, int], roles: Roles, shares: Collection[str]) -> list[Problem]:
    """Checks that every group keeps the same number of heads. A share is rounded down to a multiple of the groups."""
    groups = max((scan.groups for scan in roles.scans.values()), default=1)
    if SCAN_HEADS not in wanted or groups == 1:
        return []
    if SCAN_HEADS in shares:
        wanted[SCAN_HEADS] = max(1, wanted[SCAN_HEADS] // groups) * groups
    count = wanted[SCAN_HEADS]
    if count % groups == 0:
        return []
    near = sorted({max(1, count // groups) * groups, (count // groups + 1) * groups})
    message = f"{count} heads do not divide into the {groups} groups that share their keys and queries"
    return [Problem(f"student.{SCAN_HEADS}", message, f"write {' or '.join(map(str, near))}")]


def check_rows(wanted: Mapping[str, int], teacher: AnalysedTeacher) -> list[Problem]:
    """Checks that rows of grouped expert products take a multiple of 16 bytes in all operands, as torch requires."""
    if not any(mixture.ends is not None for mixture in teacher.roles.mixtures.values()):
        return []
    unit = GROUPED_ROW_BYTES // teacher.captured.dtype.itemsize
    stacked = {
        name
        for name, layers in teacher.roles.widths.items()
        for layer, width in layers.items()
        if width.readers and layer in teacher.roles.mixtures and width.parents == teacher.roles.mixtures[layer].experts
    }
    return [
        Problem(
            f"student.{name}",
            f"rows of {wanted[name]} channels: grouped_mm needs rows of a multiple of {GROUPED_ROW_BYTES} bytes",
            f"write a multiple of {unit}: "
            + " or ".join(str(n) for n in _multiples(wanted[name], unit, teacher.widths[name])),
        )
        for name in (HIDDEN, *sorted(stacked))
        if name in wanted and wanted[name] < teacher.widths[name] and wanted[name] % unit
    ]


def _multiples(width: int, unit: int, most: int) -> list[int]:
    """The multiples of `unit` on both sides of a width that are possible."""
    return [n for n in (width // unit * unit, (width // unit + 1) * unit) if 0 < n <= most]


def check_shared(wanted: dict[str, int], teacher: AnalysedTeacher, shares: Collection[str]) -> list[Problem]:
    """Checks a shared expert n times as wide as a routed one: its width follows the routed width, or n changes."""
    tie = find_tie(teacher.captured.config, teacher.widths)
    if tie is None or not (SHARED in wanted or tie.unit in wanted):
        return []
    unit = wanted.get(tie.unit, teacher.widths[tie.unit])
    if SHARED not in wanted:
        wanted[SHARED] = tie.times * unit
        return []
    if SHARED in shares:
        wanted[SHARED] = max(1, wanted[SHARED] // unit) * unit
    times, rest = divmod(wanted[SHARED], unit)
    if not rest and (times == tie.times or (tie.key is not None and 1 <= times <= tie.times)):
        return []
    if tie.key is None:
        message = f"this model's shared expert is always {tie.times} times as wide as {tie.unit}, which is {unit}"
        hint = f"leave it out: it follows {tie.unit}"
    else:
        message = f"the configuration counts the shared expert's width in units of {tie.unit}, which is {unit}"
        hint = f"write {' or '.join(str(n * unit) for n in range(1, tie.times + 1))}, or change {tie.unit}"
    return [Problem(f"student.{SHARED}", message, hint)]
