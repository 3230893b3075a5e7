"""The status of every axis: exact, approximate or refused, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.compiler.axes.notes import CHOICES
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    NUM_EXPERTS,
)
from minitron.compiler.roles.widths import leaves_of, uniform


@dataclass(frozen=True)
class AxisStatus:
    """One line of the plan: `status` is exact, approximate or refused."""

    axis: str
    teacher: int
    student: int
    status: str
    reason: str


_ROTARY = "rotary"  # how modelling code calls the module whose buffers are the frequencies


def status_of(name: str, teacher: AnalysedTeacher) -> tuple[str, str]:
    """Returns whether an axis can be narrowed, exactly or approximately, and why."""
    if name == LAYERS:
        return "exact", "the same as zeroing the layer's residual update"
    if name in teacher.roles.refusals:
        return "refused", teacher.roles.refusals[name]
    leaves = leaves_of(name, teacher.roles, teacher.table)
    if not leaves:
        return "refused", f"the graph of {teacher.captured.config.model_type} shows no such axis"
    pins = sorted({pin for leaf in leaves for pin in leaf.pins})
    if pins and name == HEAD_DIM and _ROTARY in pins[0].place:
        return "refused", f"fixed by the rotary embeddings ({pins[0].place})"
    if pins:
        return "refused", str(pins[0])
    if name == HEAD_DIM:
        return "refused", "queries, keys and values have separate widths in the graph, and one key in the configuration"
    if name in teacher.roles.widths and not uniform(w.size for w in teacher.roles.widths[name].values()):
        return "refused", "its width differs from layer to layer, which the configuration could not say of the student"
    if name in (HEADS, GROUPS) and not uniform((site.groups, site.repeats) for site in teacher.roles.heads.values()):
        return "refused", "its number differs from layer to layer, which the configuration could not say of the student"
    notes = sorted({(note.kind, note.place) for leaf in leaves for note in leaf.notes})
    changed = [(kind, place) for kind, place in notes if kind not in ("mean", "rms_norm", *CHOICES)]
    if changed:
        kind, place = changed[0]
        return "approximate", f"{kind} is taken over the kept channels, which differs from masking ({place})"
    chosen = sorted({kind for kind, _ in notes if kind in CHOICES})
    if chosen:
        what = "the router gives no weight to experts that are gone" if name == NUM_EXPERTS else "masked with -infinity"
        return (
            "exact",
            f"identical to the masked teacher, where {what} ({' and '.join(chosen)} over those that are left)",
        )
    if notes:
        return "exact", "identical to the masked teacher, with norms over the kept channels"
    return "exact", "identical to the masked teacher"
