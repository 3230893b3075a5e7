"""Targets: what the spec asks for, resolved against what the teacher has. Every width that cannot be is an error here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minitron.compiler.axes.notes import CHOICES
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.roles.names import (
    CONVOLVED,
    COUNTS,
    FEED_FORWARD,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    NUM_EXPERTS,
    SCAN_HEADS,
    SHARED,
)
from minitron.compiler.roles.roles import Roles
from minitron.compiler.roles.widths import leaves_of, teacher_widths, uniform
from minitron.compiler.shared_experts import find_tie
from minitron.specs.blocks.student import Student
from minitron.specs.errors import SpecError
from minitron.specs.units import Share, default_multiple

# torch.nn.functional.grouped_mm: "strides should be multiple of 16 bytes", on processors and on graphics cards.
GROUPED_ROW_BYTES = 16


MakeError = Callable[[str, str, str], SpecError]


@dataclass(frozen=True)
class AxisStatus:
    """One line of the plan: `status` is exact, approximate or refused."""

    axis: str
    teacher: int
    student: int
    status: str
    reason: str


@dataclass(frozen=True)
class Targets:
    """`widths`: the narrowed axes by name; `layers`: how many stay; `named_layers`: which, where the spec says so."""

    widths: Mapping[str, int]
    layers: int
    named_layers: tuple[int, ...] | None
    statuses: tuple[AxisStatus, ...]


def status_of(name: str, captured: Captured, roles: Roles, table: AxisTable) -> tuple[str, str]:
    """Whether an axis can be narrowed, exactly or approximately, and why."""
    if name == LAYERS:
        return "exact", "a dropped layer is passed by"
    if name in roles.refusals:
        return "refused", roles.refusals[name]
    leaves = leaves_of(name, roles, table)
    if not leaves:
        return "refused", f"the graph of {captured.config.model_type} shows no such axis"
    pins = sorted({pin for leaf in leaves for pin in leaf.pins})
    if pins:
        return "refused", str(pins[0])
    if name == HEAD_DIM:
        return "refused", "queries, keys and values have separate widths in the graph, and one key in the configuration"
    if name in roles.widths and not uniform(w.size for w in roles.widths[name].values()):
        return "refused", "its width differs from layer to layer, which the configuration could not say of the student"
    if name in (HEADS, GROUPS) and not uniform((site.groups, site.repeats) for site in roles.heads.values()):
        return "refused", "its number differs from layer to layer, which the configuration could not say of the student"
    notes = sorted({(note.kind, note.place) for leaf in leaves for note in leaf.notes})
    changed = [(kind, place) for kind, place in notes if kind not in ("mean", "rms_norm", *CHOICES)]
    if changed:
        kind, place = changed[0]
        return "approximate", f"{kind} is taken over the channels that are left, not equal to masking ({place})"
    chosen = sorted({kind for kind, _ in notes if kind in CHOICES})
    if chosen:
        what = "the router gives no weight to experts that are gone" if name == NUM_EXPERTS else "masked with -infinity"
        return "exact", f"equal to masking, where {what} ({' and '.join(chosen)} over those that are left)"
    if notes:
        return "exact", "equal to masking, once the mean square of each norm is taken over the channels that are left"
    return "exact", "equal to masking"


def resolve_targets(
    student: Student, captured: Captured, roles: Roles, table: AxisTable, error: MakeError
) -> tuple[Targets | None, list[SpecError]]:
    """`student` is the spec's block; `error(path, message, hint)` places an error in the spec."""
    teacher = teacher_widths(captured, roles, table)
    errors: list[SpecError] = []
    wanted: dict[str, int] = {}
    for key, value in student.targets():
        path = f"student.{key}"
        if key not in teacher:
            errors.append(error(path, f"the teacher ({captured.config.model_type}) has no {key}", "leave it out"))
            continue
        values = value if isinstance(value, tuple) else (value,)  # a search has several candidates
        for index, one in enumerate(values):
            here = f"{path}.{index}" if isinstance(value, tuple) else path
            width = _width(key, one, teacher[key], student.multiple_of)
            if not 0 < width <= teacher[key]:
                message = f"{width} is not between 1 and the teacher's {teacher[key]}"
                hint = f"write at most {teacher[key]}" if width > 0 else "write a larger share, or a number"
                errors.append(error(here, message, hint))
                continue
            status, reason = status_of(key, captured, roles, table)
            if width < teacher[key] and status == "refused":
                errors.append(error(here, f"cannot be narrowed: {reason}", f"leave it out, or write {teacher[key]}"))
            elif len(values) == 1:
                wanted[key] = width
    shares = {key for key, value in student.targets() if isinstance(value, Share)}
    errors += check_heads(wanted, teacher, shares, error)
    errors += check_experts(wanted, roles, shares, error)
    errors += check_scan_heads(wanted, roles, shares, error)
    errors += check_rows(wanted, teacher, captured, roles, error)
    errors += check_shared(wanted, teacher, captured, shares, error)
    layers, named = _layers(student, captured.layer_count, wanted, error, errors)
    if errors:
        return None, errors
    widths = {key: width for key, width in wanted.items() if key != LAYERS and width < teacher[key]}
    statuses = tuple(
        AxisStatus(
            name,
            teacher[name],
            layers if name == LAYERS else widths.get(name, teacher[name]),
            *status_of(name, captured, roles, table),
        )
        for name in teacher
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
    """A number as it is; a share of a width rounded down to a multiple, of a count to a whole number."""
    if not isinstance(value, Share):
        return int(value)
    return value.of(teacher, 1 if key in COUNTS else multiple_of or default_multiple(teacher))


def check_heads(
    wanted: dict[str, int], teacher: Mapping[str, int], shares: Collection[str], error: MakeError
) -> list[SpecError]:
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
    return [error(path, message, f"write {' or '.join(map(str, near))}, or change {GROUPS}")]


def check_experts(wanted: dict[str, int], roles: Roles, shares: Collection[str], error: MakeError) -> list[SpecError]:
    """The router must find as many experts as it picks. A share is rounded down to a number that divides into its groups."""
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
        return [error(path, message, f"write {' or '.join(map(str, near))}")]
    if count < least:
        message = f"{count} experts are fewer than the router needs: it sends every token to {picked}"
        if groups > 1:
            message += f", and picks among {groups} groups of experts first"
        return [error(path, message, f"write at least {least}")]
    return []


def check_scan_heads(
    wanted: dict[str, int], roles: Roles, shares: Collection[str], error: MakeError
) -> list[SpecError]:
    """As many heads stay in each group. A share is rounded down to a number that divides into the groups."""
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
    return [error(f"student.{SCAN_HEADS}", message, f"write {' or '.join(map(str, near))}")]


def check_rows(
    wanted: Mapping[str, int], teacher: Mapping[str, int], captured: Captured, roles: Roles, error: MakeError
) -> list[SpecError]:
    """Torch multiplies the sorted rows of experts only where rows of all operands take whole units of so many bytes."""
    if not any(mixture.ends is not None for mixture in roles.mixtures.values()):
        return []
    unit = GROUPED_ROW_BYTES // captured.dtype.itemsize
    stacked = {
        name
        for name, layers in roles.widths.items()
        for layer, width in layers.items()
        if width.readers and layer in roles.mixtures and width.parents == roles.mixtures[layer].experts
    }
    return [
        error(
            f"student.{name}",
            f"rows of {wanted[name]} channels are none that torch can multiply expert by expert",
            f"write a multiple of {unit}: "
            + " or ".join(str(n) for n in _multiples(wanted[name], unit, teacher[name])),
        )
        for name in (HIDDEN, *sorted(stacked))
        if name in wanted and wanted[name] < teacher[name] and wanted[name] % unit
    ]


def _multiples(width: int, unit: int, most: int) -> list[int]:
    """The multiples of `unit` on both sides of a width that are possible."""
    return [n for n in (width // unit * unit, (width // unit + 1) * unit) if 0 < n <= most]


def check_shared(
    wanted: dict[str, int], teacher: Mapping[str, int], captured: Captured, shares: Collection[str], error: MakeError
) -> list[SpecError]:
    """Where the shared expert's width is so many times that of a routed one, it follows it, or their number changes."""
    tie = find_tie(captured.config, teacher)
    if tie is None or not (SHARED in wanted or tie.unit in wanted):
        return []
    unit = wanted.get(tie.unit, teacher[tie.unit])
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
    return [error(f"student.{SHARED}", message, hint)]


def _layers(
    student: Any, count: int, wanted: dict[str, int], error: MakeError, errors: list[SpecError]
) -> tuple[int, tuple[int, ...] | None]:
    named = student.layers
    if named is None:
        return wanted.get(LAYERS, count), None
    key = "drop" if named.drop is not None else "keep"
    numbers = named.drop if named.drop is not None else named.keep
    path = f"student.layers.{key}"
    if any(n >= count for n in numbers):
        errors.append(error(path, f"layer {max(numbers)} does not exist", f"the teacher has layers 0 to {count - 1}"))
        return count, None
    kept = tuple(i for i in range(count) if (i in set(numbers)) == (key == "keep"))
    if not kept:
        errors.append(error(path, "no layer would be left", "keep at least one"))
        return count, None
    return len(kept), kept
