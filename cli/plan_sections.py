"""The sections of a plan: teacher and student side by side, axes, phases, the fit to a device, the selection once
made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minitron.cli import figures
from minitron.cli.search_sections import search_sections
from minitron.cli.sections import Column, Document, Section, entries, part


def plan_sections(plan: Document) -> list[Section]:
    """Returns all sections of a plan (`plan --json`, plan.json), always in the same order."""
    sections = [_models(plan), _axes(plan)]
    sections += [
        one
        for one in (
            *search_sections(part(plan, "search")),
            _phases(plan),
            _devices(plan),
            _costs(plan),
            deployment_section(plan),
            selection_section(plan),
            fits_section(plan),
        )
        if one is not None
    ]
    return sections


def selection_section(plan: Document) -> Section | None:
    """Returns the section of the kept indices of each axis, shortened; None before anything was selected."""
    selection = part(plan, "selection")
    if not selection:
        return None
    columns = (Column("axis"), Column("lists", right=True), Column("kept of each", right=True), Column("first list"))
    rows = []
    for axis, lists in selection.items():
        sizes = figures.width([len(one) for one in lists])
        rows.append((axis, figures.count(len(lists)), sizes, figures.kept(lists[0]) if lists else figures.NOTHING))
    return Section("Selection", columns, tuple(rows))


def model_rows(plan: Document) -> Iterator[tuple[str, Any, Any, str, bool]]:
    """Yields (label, teacher's value, student's value, kind, comparable) for every width and cost of a plan.

    `kind` names the function of `figures` that writes the value; `comparable` says whether a ratio means anything.
    """
    teacher, student = part(plan, "teacher"), part(plan, "student")
    yield "model type", teacher.get("model_type"), student.get("model_type"), "width", False
    old, new = part(teacher, "widths"), part(student, "widths")
    for key in [*old, *(key for key in new if key not in old)]:
        yield key, old.get(key), new.get(key), "width", True
    for label, key, kind in (
        ("parameters", "parameters", "count"),
        ("parameters without embeddings", "non_embedding_parameters", "count"),
        ("parameters active per token", "active_parameters", "count"),
        ("weights", "weight_bytes", "size"),
        ("KV cache per token", "kv_cache_bytes_per_token", "size"),
        ("FLOPs per token", "flops_per_token", "short"),
    ):
        yield label, teacher.get(key), student.get(key), kind, True


def written(value: Any, kind: str) -> str:
    """Formats one value of `model_rows`."""
    if kind == "size":
        return figures.size(value)
    if kind == "count":
        return figures.count(value)
    return figures.short(value) if kind == "short" else figures.width(value)


def _models(plan: Document) -> Section:
    spec = part(plan, "spec")
    columns = (Column(""), Column("teacher", right=True), Column("student", right=True), Column("kept", right=True))
    rows = tuple(
        (label, written(old, kind), written(new, kind), ratio(old, new) if comparable else "")
        for label, old, new, kind, comparable in model_rows(plan)
    )
    return Section(f"Plan {spec.get('name', '')}".rstrip(), columns, rows, origin_notes(plan))


def origin_notes(plan: Document) -> tuple[str, ...]:
    """Returns the notes on the origin of a plan: its spec, its teacher, and remarks on them."""
    spec = part(plan, "spec")
    digest = str(spec.get("sha256", ""))[:12]
    notes = [f"spec {spec.get('path', figures.NOTHING)}, sha256 {digest}"] if spec else []
    teacher = part(plan, "teacher")
    if teacher.get("model"):
        commit = teacher.get("commit")
        pinned = ", pinned by the lock file" if "teacher.revision" in part(spec, "pins") else ""
        notes.append(f"teacher {teacher['model']}" + (f" at commit {str(commit)[:12]}{pinned}" if commit else ""))
    return (*notes, *(str(remark) for remark in plan.get("remarks") or ()))


def ratio(old: Any, new: Any) -> str:
    """Formats the share of a width or cost that is kept; for a per-layer list, the share of its mean."""
    return figures.percent(_mean(new), _mean(old))


def _mean(value: Any) -> float | None:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
        return None
    return float(sum(numbers)) / len(numbers)


def _axes(plan: Document) -> Section:
    columns = (
        Column("axis"),
        Column("teacher", right=True),
        Column("student", right=True),
        Column("status"),
        Column("reason"),
    )
    rows = tuple(
        (
            str(one.get("axis", "")),
            figures.width(one.get("teacher")),
            figures.width(one.get("student")),
            str(one.get("status", "")),
            str(one.get("reason") or ""),
        )
        for one in entries(plan, "axes")
    )
    return Section("Axes", columns, rows)


def _phases(plan: Document) -> Section | None:
    phases = entries(plan, "phases")
    if not phases:
        return None
    stores = any(one.get("disk_bytes") is not None for one in phases)
    columns = (
        Column("phase"),
        Column("tokens", right=True),
        Column("FLOPs", right=True),
        Column("peak memory", right=True),
        *((Column("disk", right=True),) if stores else ()),
        Column("device-hours", right=True),
    )
    rows = tuple(
        (
            str(one.get("name", "")),
            figures.count(one.get("tokens")),
            figures.short(one.get("flops")),
            figures.size(one.get("peak_memory_bytes")),
            *((figures.size(one.get("disk_bytes")),) if stores else ()),
            figures.hours(one.get("device_hours")),
        )
        for one in phases
    )
    devices = dict.fromkeys(str(one["device"]) for one in phases if one.get("device"))
    notes = [f"{one.get('name', '')}: {one['does']}" for one in phases if one.get("does")]
    notes += [f"device-hours of {device}" for device in devices]
    return Section("Phases", columns, rows, tuple(notes))


def _devices(plan: Document) -> Section | None:
    """Returns the section of the time that all phases together take on other devices."""
    rows = tuple(
        (
            str(one.get("device", "")),
            figures.size(one.get("memory_bytes")),
            figures.hours(one.get("device_hours")),
            figures.hours(one.get("days")),
        )
        for one in entries(plan, "devices")
    )
    columns = (
        Column("devices"),
        Column("memory of one", right=True),
        Column("device-hours", right=True),
        Column("days", right=True),
    )
    return Section("Devices", columns, rows, ("all phases, at the same share of each device's peak",)) if rows else None


def _costs(plan: Document) -> Section | None:
    """Returns the section of every cost and its kind: exact where it follows from shapes and the spec alone, else
    estimated.
    """
    costs = entries(plan, "costs")
    if not costs:
        return None
    columns = (Column("cost"), Column("value", right=True), Column("is"), Column("note"))
    rows = tuple(
        (
            str(one.get("name", "")),
            _cost(one.get("value"), str(one.get("unit", ""))),
            str(one.get("basis", "")),
            str(one.get("note") or ""),
        )
        for one in costs
    )
    return Section("Costs", columns, rows)


def _cost(value: Any, unit: str) -> str:
    if unit == "bytes":
        return figures.size(value)
    if unit in ("hours", "days"):
        return figures.hours(value)
    return figures.short(value) if unit == "FLOPs" else figures.count(value)


def deployment_section(plan: Document) -> Section | None:
    """Returns the section of the programs and devices that can run the student, as far as its shapes decide it."""
    found = entries(plan, "deployment")
    if not found:
        return None
    columns = (Column("deployment"), Column("possible"), Column("what stands in the way"), Column("nearest widths"))
    rows = tuple(
        (
            str(one.get("name")),
            str(one.get("value")),
            str(one.get("reason") or figures.NOTHING),
            str(one.get("nearest") or figures.NOTHING),
        )
        for one in found
    )
    return Section("Where it can run", columns, rows)


def fits_section(plan: Document) -> Section | None:
    """Returns the section that tells whether the phases fit the device, where one was named, and which changes make
    them fit.
    """
    fits = part(plan, "fits")
    if not fits:
        return None
    device = str(fits.get("device", "the device"))
    device = "this machine" if device.startswith("this") else device
    if fits.get("ok"):
        return Section("Fits", notes=(f"fits {device}",))
    reason, nearest = fits.get("reason"), fits.get("nearest")
    notes = [f"does not fit {device}" + (f": {reason}" if reason else "")]
    notes.append(f"the nearest change that fits: {nearest}" if nearest else "no change that was tried makes it fit")
    return Section("Fits", notes=tuple(notes))
