"""The sections of results.json: the models side by side, their benchmarks, the requirements, and each model's
continuation.
"""

from __future__ import annotations

from minitron.cli import figures
from minitron.cli.search_sections import candidates_section
from minitron.cli.sections import Column, Document, Section, entries, part

# The order in which the models of a build always stand.
MODELS = ("teacher", "corrected_teacher", "pruned", "distilled")


def results_sections(results: Document) -> list[Section]:
    """Returns the sections of results.json; benchmarks, requirements and continuations only where there are some."""
    models = part(results, "models")
    names = [name for name in MODELS if isinstance(models.get(name), dict)]
    sections = [_sizes(results, names)]
    if any(part(models[name], "tasks") for name in names):
        sections.append(_benchmarks(results, names))
    if (search := part(results, "search")) and entries(search, "candidates"):
        sections.append(candidates_section(search))
    if requirements := entries(results, "requirements"):
        sections.append(_requirements(requirements))
    continuations = tuple(
        (name, str(models[name]["continuation"])) for name in names if models[name].get("continuation") is not None
    )
    if results.get("prompt") is not None and continuations:
        rows = (("prompt", str(results["prompt"])), *continuations)
        sections.append(Section("Continuations", (Column(""), Column("text")), rows))
    return sections


def _sizes(results: Document, names: list[str]) -> Section:
    models = part(results, "models")
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
    notes = []
    if results.get("recovered") is not None:
        notes.append(f"recovered: {figures.percent(results['recovered'])} of the loss that pruning cost")
    return Section("Results", columns, tuple(rows), tuple(notes))


def _benchmarks(results: Document, names: list[str]) -> Section:
    """Returns the section with a row for each benchmark: scores with their standard errors, the last model's share of
    the teacher's score, and scores that others have published for the same student.
    """
    models, published = part(results, "models"), part(results, "published")
    last = names[-1]
    columns = [Column("benchmark"), Column("shots", right=True), *(Column(name, right=True) for name in names)]
    compared = last != "teacher" and "teacher" in names
    if compared:
        columns.append(Column("of teacher", right=True))
    if published:
        columns.append(Column("published", right=True))
    rows = []
    for task in dict.fromkeys(task for name in names for task in part(models[name], "tasks")):
        scores = {name: part(part(models[name], "tasks"), task) for name in names}
        known = next((one for one in scores.values() if one.get("metric")), {})
        label = f"{task} ({known['metric']})" if known.get("metric") else task
        if known.get("limit"):
            label += f", first {figures.count(known['limit'])}"
        row = [label, figures.count(known.get("shots")), *(_score(one) for one in scores.values())]
        if compared:
            row.append(figures.percent(scores[last].get("of_teacher")))
        if published:
            row.append(figures.decimal(part(published, "scores").get(task)))
        rows.append(tuple(row))
    notes = (f"published: {published.get('source')}",) if published else ()
    return Section("Benchmarks", tuple(columns), tuple(rows), notes)


def _requirements(requirements: list[Document]) -> Section:
    columns = (Column("required"), Column("bound"), Column("limit", right=True), Column("is", right=True), Column(""))
    rows = tuple(
        (
            str(one.get("name")),
            str(one.get("bound")),
            figures.decimal(one.get("limit")),
            figures.decimal(one.get("value")),
            "reached" if one.get("ok") else "NOT REACHED",
        )
        for one in requirements
    )
    return Section("Requirements", columns, rows)


def shortfalls(results: Document) -> list[str]:
    """Returns a sentence for each benchmark that failed and each requirement that is not met."""
    models = part(results, "models")
    lines = [
        f"error: {name}: {score['error']}"
        for name in models
        for score in part(models[name], "tasks").values()
        if score.get("error")
    ]
    for one in entries(results, "requirements"):
        if not one.get("ok"):
            lines.append(f"error: evaluate.require.{one.get('name')}: {_short(one)}")
    return lines


def _short(one: Document) -> str:
    model, bound = one.get("model"), one.get("bound")
    if one.get("value") is None:
        return f'"{bound}" cannot be judged: it was not measured of the {model} model'
    if one.get("limit") is None:
        return f'"{bound}" cannot be judged: it was not measured of the model that it is compared with'
    is_now, limit = figures.decimal(one["value"]), figures.decimal(one["limit"])
    return f'the {model} model has {is_now}, "{bound}" is {limit}: short by {figures.decimal(one.get("short_by"), 2)}'


def _score(score: Document) -> str:
    if score.get("error"):
        return "failed"
    if score.get("value") is None:
        return figures.NOTHING
    stderr = score.get("stderr")
    return figures.decimal(score["value"]) + (f" ± {figures.decimal(stderr, 2)}" if stderr is not None else "")
