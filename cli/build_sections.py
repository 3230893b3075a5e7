"""The sections of what a build has come to: checks, training progress, results."""

from __future__ import annotations

from typing import Any

from minitron.cli import figures
from minitron.cli.sections import Column, Document, Section, entries, part

# The order in which the models of a build always stand.
MODELS = ("teacher", "corrected_teacher", "pruned", "distilled")


def verification_section(verification: Document) -> Section:
    """verification.json: every check with its largest error and what was allowed."""
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
            "exact" if one.get("exact") else "not exact by nature",
            figures.decimal(one.get("max_error"), 3),
            figures.decimal(one.get("tolerance"), 3),
        )
        for one in entries(verification, "checks")
    )
    verdict = "all checks passed" if verification.get("passed") else "verification FAILED"
    return Section("Verification", columns, rows, (verdict,))


def training_section(training: Document) -> Section:
    """The last step of training beside the first (see `builds.training_progress`)."""
    columns = (Column(""), Column("first step", right=True), Column("last step", right=True))
    first, last = part(training, "first"), part(training, "last")
    rows = [(key, _figure(key, first.get(key)), _figure(key, last.get(key))) for key in last]
    total = training.get("total_tokens")
    done = last.get("tokens")
    notes = []
    if total and done is not None:
        notes.append(f"{figures.count(done)} of {figures.count(total)} tokens, {figures.percent(done, total)}")
    return Section("Training", columns, tuple(rows), tuple(notes))


def results_sections(results: Document) -> list[Section]:
    """results.json: the models side by side, what distillation won back, and what each writes for one prompt."""
    models = part(results, "models")
    names = [name for name in MODELS if isinstance(models.get(name), dict)]
    columns = (Column(""), *(Column(name, right=True) for name in names))
    rows: list[tuple[str, ...]] = [
        ("parameters", *(figures.count(models[name].get("parameters")) for name in names)),
        ("size on disk", *(figures.size(models[name].get("weight_bytes")) for name in names)),
    ]
    if any(models[name].get("held_out") for name in names):
        held_out = [part(models[name], "held_out") for name in names]
        rows += [
            ("held-out loss", *(figures.decimal(one.get("loss")) for one in held_out)),
            ("held-out perplexity", *(figures.decimal(one.get("perplexity")) for one in held_out)),
            ("held-out tokens", *(figures.count(one.get("tokens")) for one in held_out)),
        ]
    rows.append(("tokens per second", *(figures.count(models[name].get("tokens_per_second")) for name in names)))
    tasks = dict.fromkeys(task for name in names for task in part(models[name], "tasks"))
    for task in tasks:
        scores = [part(part(models[name], "tasks"), task) for name in names]
        metric = next((str(one["metric"]) for one in scores if one.get("metric")), "")
        rows.append((f"{task} ({metric})" if metric else task, *(_score(one) for one in scores)))
    notes = []
    if results.get("recovered") is not None:
        notes.append(f"recovered: {figures.percent(results['recovered'])} of the loss that pruning cost")
    sections = [Section("Results", columns, tuple(rows), tuple(notes))]
    continuations = tuple(
        (name, str(models[name]["continuation"])) for name in names if models[name].get("continuation") is not None
    )
    if results.get("prompt") is not None and continuations:
        rows_prompt = (("prompt", str(results["prompt"])), *continuations)
        sections.append(Section("Continuations", (Column(""), Column("text")), rows_prompt))
    return sections


def _score(score: Document) -> str:
    if score.get("value") is None:
        return figures.NOTHING
    stderr = score.get("stderr")
    return figures.decimal(score["value"]) + (f" ± {figures.decimal(stderr, 2)}" if stderr is not None else "")


def _figure(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return figures.NOTHING if value is None else str(value)
    if key.endswith("_bytes") or key == "mfu":
        return figures.measured(key, value)[1]
    return figures.count(value) if isinstance(value, int) or key.endswith("per_second") else figures.decimal(value)
