"""The sections of a build: checks, training progress, results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minitron.cli import figures
from minitron.cli.plan_summary import shown_plan
from minitron.cli.results_sections import results_sections
from minitron.cli.sections import Column, Document, Section, entries, part


def build_sections(content: Document, *, full: bool = False) -> list[Section]:
    """Returns the sections of everything that is known about a build (`builds.show_document`): plan, checks, training,
    results.
    """
    sections: list[Section] = []
    if content["plan"] is not None:
        sections += shown_plan(content["plan"], full=full)
    if content["edited"]:
        sections.append(_edits_section(content["edited"]))
    if content["verification"] is not None:
        sections.append(verification_section(content["verification"]))
    if content["training"] is not None:
        sections.append(training_section(content["training"]))
    if content["results"] is not None:
        sections += results_sections(content["results"])
    return sections


def _edits_section(edited: Sequence[Document]) -> Section:
    """Returns the section of the values in training.yaml that were edited by hand."""
    columns = (Column("edited in training.yaml"), Column("as generated", right=True), Column("now", right=True))
    rows = tuple((one["path"], _plain(one["generated"]), _plain(one["written"])) for one in edited)
    return Section("Edited by hand", columns, rows, ("training takes what stands there now",))


def _plain(value: Any) -> str:
    return figures.NOTHING if value is None else value if isinstance(value, str) else json.dumps(value)


def verification_section(verification: Document) -> Section:
    """Returns the section of verification.json: every check with its largest error and its tolerance."""
    columns = (
        Column("check"),
        Column("result"),
        Column("kind"),
        Column("largest error", right=True),
        Column("tolerance", right=True),
    )
    rows = tuple(
        (
            str(one.get("name", "")),
            "passed" if one.get("passed") else "FAILED",
            _kind(one),
            figures.decimal(one.get("max_error"), 3),
            figures.decimal(one.get("tolerance"), 3),
        )
        for one in entries(verification, "checks")
    )
    verdict = "all checks passed" if verification.get("passed") else "verification FAILED"
    return Section("Verification", columns, rows, (verdict,))


def _kind(check: Document) -> str:
    """Returns what a check compares: the same numbers, or the same up to rounding (of bf16 where that is the dtype)."""
    if not check.get("exact"):
        return "not exact by nature"
    return "up to rounding" if check.get("max_error") else "exact"


def training_section(training: Document) -> Section:
    """Returns the section that sets the last step of training beside the first (see `builds.training_progress`)."""
    columns = (Column(""), Column("first step", right=True), Column("last step", right=True))
    first, last = part(training, "first"), part(training, "last")
    rows = [(key, _figure(key, first.get(key)), _figure(key, last.get(key))) for key in last]
    total = training.get("total_tokens")
    done = last.get("tokens")
    notes = []
    if total and done is not None:
        notes.append(f"{figures.count(done)} of {figures.count(total)} tokens, {figures.percent(done, total)}")
    return Section("Training", columns, tuple(rows), tuple(notes))


def _figure(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return figures.NOTHING if value is None else str(value)
    if key.endswith("_bytes") or key == "mfu":
        return figures.measured(key, value)[1]
    return figures.count(value) if isinstance(value, int) or key.endswith("per_second") else figures.decimal(value)
