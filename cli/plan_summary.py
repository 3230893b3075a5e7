"""The first screen of a plan: the changes, the training, and the costs; the rest stands behind `--full`."""

from __future__ import annotations

from typing import Any

from minitron.cli import figures
from minitron.cli.plan_sections import (
    deployment_section,
    fits_section,
    model_rows,
    origin_notes,
    plan_sections,
    ratio,
    selection_section,
    written,
)
from minitron.cli.search_sections import search_sections
from minitron.cli.sections import Column, Document, Section, entries, part

# Of the costs of a model, those that decide whether it is worth having.
_SHOWN = {"parameters", "weights", "KV cache per token", "FLOPs per token"}


def shown_plan(plan: Document, *, full: bool, build: str | None = None) -> list[Section]:
    """Returns the sections of a plan: the summary, or with `full` everything; `build` describes the content of the
    build folder.
    """
    sections = plan_sections(plan) if full else summary(plan)
    return [*sections, *([Section("Build", notes=(build,))] if build else ())]


def summary(plan: Document) -> list[Section]:
    """Returns the sections of the changes, the training, the costs of each phase, the fit to a device, and the kept
    indices.
    """
    found = (
        _changes(plan),
        _training(plan),
        *search_sections(part(plan, "search")),
        _phases(plan),
        deployment_section(plan),
        selection_section(plan),
        fits_section(plan),
    )
    return [section for section in found if section is not None]


def _changes(plan: Document) -> Section:
    columns = (Column(""), Column("teacher", right=True), Column("student", right=True), Column("kept", right=True))
    widths = part(part(plan, "teacher"), "widths").keys() | part(part(plan, "student"), "widths").keys()
    rows = tuple(
        (label, written(old, kind), written(new, kind), ratio(old, new))
        for label, old, new, kind, _ in model_rows(plan)
        if label in _SHOWN or (label in widths and old != new)
    )
    notes = [_exactness(plan), *origin_notes(plan)]
    return Section(f"Plan {part(plan, 'spec').get('name', '')}".rstrip(), columns, rows, tuple(filter(None, notes)))


def _exactness(plan: Document) -> str:
    """Returns one line on the narrowed axes: those that are the same as zeroing the dropped part, and those that are
    not; and what is repaired afterwards, which zeroing is not.
    """
    narrowed = [one for one in entries(plan, "axes") if one.get("teacher") != one.get("student")]
    if not narrowed:
        return "no axis changes"
    others = [str(one.get("axis")) for one in narrowed if one.get("status") != "exact"]
    repairs = _repairs(plan, {str(one.get("axis")) for one in narrowed})
    then = f"; then recovery changes what is kept: {', '.join(repairs)}" if repairs else ""
    if not others:
        return f"exact on every axis: the same as zeroing what is dropped{then}"
    return f"approximate: {', '.join(others)}; `--full` says why{then}"


def _repairs(plan: Document, narrowed: set[str]) -> list[str]:
    """Returns the keys of `recovery` that change weights where these axes are narrowed."""
    recovery = part(part(part(plan, "spec"), "resolved"), "recovery")
    of = {
        "refit": narrowed - {"num_hidden_layers"},
        "merge_heads": narrowed & {"num_attention_heads", "num_key_value_heads"},
        "merge_experts": narrowed & {"num_experts"},
    }
    return [key for key, axes in of.items() if axes and recovery.get(key) not in (None, False, "none")]


def _training(plan: Document) -> Section | None:
    """Returns the section of the training: loss, tokens, steps, batch, learning rate."""
    spec = part(plan, "spec")
    fitted = {key.removeprefix("distill."): value for key, value in part(spec, "fitted").items()}
    distill = {**part(part(spec, "resolved"), "distill"), **fitted}
    chosen = _of_candidate(part(plan, "search"))
    distill = distill | {"global_batch_size": chosen.get("global_batch_size", distill.get("global_batch_size"))}
    tokens, length, batch = (distill.get(key) for key in ("tokens", "sequence_length", "global_batch_size"))
    if not (isinstance(tokens, int) and isinstance(length, int) and isinstance(batch, int)):
        return None
    optimizer = part(distill, "optimizer")
    optimizer = optimizer | {"lr": chosen.get("lr", optimizer.get("lr"))}
    phases = entries(distill, "phases")
    # The last step of each is a whole one.
    trained = sum(steps * size for steps, size in map(_steps_of, phases or [distill]))
    rows = [
        ("tokens", figures.count(trained) + ("" if trained == tokens else f", {figures.count(tokens)} asked for")),
        *(_data_row(one) for one in entries(plan, "data")),
        *_tokenizing(entries(plan, "data")),
        *(
            (f"steps of phase {number}" if phases else "steps", _steps(one))
            for number, one in enumerate(phases or [distill], 1)
        ),
        (
            "learning rate",
            f"{_rate(optimizer.get('lr'))} to {_rate(optimizer.get('min_lr'))}, "
            f"after {figures.plural(optimizer.get('warmup_steps') or 0, 'step')} of warm-up",
        ),
    ]
    correction = part(part(part(plan, "spec"), "resolved"), "teacher_correction")
    if correction.get("tokens"):
        rows.append(("teacher correction", f"{figures.count(correction['tokens'])} tokens"))
    return Section("Training", (Column(""), Column("")), tuple(rows))


def _steps(phase: Document) -> str:
    batch, length = int(phase.get("global_batch_size") or 1), int(phase.get("sequence_length") or 1)
    steps = figures.count(_steps_of(phase)[0])
    return f"{steps} of {figures.plural(batch, 'sequence')} of {figures.plural(length, 'token')}"


def _steps_of(phase: Document) -> tuple[int, int]:
    """Returns the steps of a stretch of the training, and the tokens of one."""
    tokens, length, batch = (int(phase.get(key) or 1) for key in ("tokens", "sequence_length", "global_batch_size"))
    return -(-tokens // (length * batch)), length * batch


def _data_row(one: Document) -> tuple[str, str]:
    """Returns the row of one source of the training: its size, and how often it is read."""
    words = [figures.plural(int(one.get("files") or 0), "file"), figures.size(one.get("bytes"))]
    if one.get("tokens"):
        words.append(f"about {figures.short(one['tokens'])} tokens")
    if one.get("passes") is not None:
        few = one["passes"] < 0.1
        words.append("less than a tenth of them read" if few else f"read {one['passes']:.1f} times")
    return str(one.get("source", "")).removeprefix("distill."), ", ".join(words)


def _tokenizing(data: list[Document]) -> list[tuple[str, str]]:
    """Returns the row of what tokenizing all sources takes, on the disk and in memory."""
    disk = sum(int(one.get("disk_bytes") or 0) for one in data)
    memory = max((int(one.get("process_bytes") or 0) for one in data), default=0)
    words = [f"{figures.size(disk)} on disk"] if disk else []
    words += [f"about {figures.size(memory)} of memory for each core that tokenizes"] if memory else []
    return [("tokenized", ", ".join(words))] if words else []


def _of_candidate(search: Document) -> Document:
    """Returns the candidate of a search that the plan is of; empty where there is no search."""
    return next((one for one in entries(search, "candidates") if one.get("number") == search.get("candidate")), {})


def _rate(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else figures.NOTHING


def _phases(plan: Document) -> Section | None:
    """Returns the section with a row for each phase: memory, disk and time, in everyday units."""
    phases = entries(plan, "phases")
    if not phases:
        return None
    columns = (
        Column("phase"),
        Column("tokens", right=True),
        Column("memory", right=True),
        Column("disk", right=True),
        Column("time", right=True),
    )
    rows = tuple(
        (
            str(one.get("name", "")),
            figures.short(one.get("tokens")),
            figures.size(one.get("peak_memory_bytes")),
            figures.size(one.get("disk_bytes") or None),
            figures.about(None if one.get("days") is None else 86_400 * float(one["days"])),
        )
        for one in phases
    )
    notes = [f"time on {device}" for device in dict.fromkeys(str(one["device"]) for one in phases if one.get("device"))]
    hours = sum(float(one.get("device_hours") or 0) for one in phases)
    if hours >= 1:
        notes.append(f"{figures.hours(hours)} device-hours in all")
    return Section("Phases", columns, rows, tuple(notes))
