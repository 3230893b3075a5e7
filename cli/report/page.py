"""The content of the page and its order: a table of contents in code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from minitron import __version__
from minitron.cli import figures
from minitron.cli.build_sections import training_section, verification_section
from minitron.cli.plan_sections import plan_sections
from minitron.cli.report.curves import Curves
from minitron.cli.report.importance import importance
from minitron.cli.report.markup import Markup, element, join
from minitron.cli.report.pareto import search_chapter
from minitron.cli.report.scores import ScoredAxis
from minitron.cli.report.style import CSS
from minitron.cli.report.tables import section_table
from minitron.cli.report.training import held_out_references, training_curves
from minitron.cli.results_sections import MODELS, results_sections
from minitron.cli.sections import Document, entries, part

# No source for scripts, images, fonts or anything else: a browser holds the page to being self-contained.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Report:
    """The data that the page is made from."""

    build: Document
    """The document that `minitron show --json` prints (see `builds.show_document`)."""

    trains: bool
    """Tells whether the training plan asks for tokens to train on."""

    scores: list[ScoredAxis]
    curves: Curves
    """The curves of the student's training."""

    correction: Curves
    """The curves of the teacher's own training before it."""

    def document(self, key: str) -> Document:
        return part(self.build, key)


@dataclass(frozen=True)
class _Chapter:
    name: str
    title: str
    content: Markup


def page(report: Report) -> str:
    """Returns the whole HTML document, ending in a newline."""
    chapters = list(_chapters(report))
    title = _name(report)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{title} - minitron"),
        element("style", Markup(CSS)),
    )
    body = element(
        "body",
        element("header", *_header(report, title, chapters)),
        element("main", *(element("section", element("h2", one.title, id=one.name), one.content) for one in chapters)),
        element("footer", element("p", f"Written by minitron {__version__}.", class_="note")),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _chapters(report: Report) -> Iterator[_Chapter]:
    """Yields the chapters that have content: results first, costs last."""
    plan, results = report.document("plan"), report.document("results")
    references = held_out_references(results)
    if results:
        # The candidates have a chapter of their own.
        shown = [one for one in results_sections(results) if one.title != "Candidates"]
        tables = [element("div", section_table(one), class_=_class(one.title)) for one in shown]
        yield _Chapter("results", "Results", join(tables))
    search = part(results, "search") or part(plan, "search")
    if any(one.get("rungs") for one in entries(search, "candidates")):
        yield _Chapter("search", "Search", search_chapter(search))
    if report.curves.records:
        summary = section_table(training_section(report.document("training")))
        yield _Chapter("training", "Training", join([summary, training_curves("curve", report.curves, references)]))
    if report.correction.records:
        yield _Chapter("correction", "Teacher correction", training_curves("correction-curve", report.correction, ()))
    if report.scores:
        yield _Chapter("importance", "Importance", importance(report.scores))
    if verification := report.document("verification"):
        yield _Chapter("verification", "Verification", section_table(verification_section(verification)))
    if plan:
        tables = [section_table(one) for one in plan_sections(plan)]
        yield _Chapter("plan", "Widths and costs", join(tables))
    resolved = part(plan, "spec").get("resolved")
    if resolved:
        written = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=110)
        yield _Chapter("spec", "The spec, every value resolved", element("pre", element("code", written)))


def _class(title: str) -> str | None:
    return "texts" if title == "Continuations" else None


def _header(report: Report, title: str, chapters: list[_Chapter]) -> Iterator[Markup | None]:
    plan = report.document("plan")
    yield element("h1", title)
    if plan:
        teacher, student = part(plan, "teacher"), part(plan, "student")
        name = str(teacher.get("model") or teacher.get("model_type") or "teacher")
        old, new = teacher.get("parameters"), student.get("parameters")
        yield element(
            "p",
            f"{name}, {figures.count(old)} parameters → {figures.count(new)} parameters ({figures.percent(new, old)})",
        )
    yield element("p", f"build {report.build.get('build', '')}", class_="note")
    missing = [element("li", one) for one in _missing(report)]
    if missing:
        yield element("ul", *missing, class_="missing", aria_label="What is not there yet")
    tiles = [
        element("div", element("dt", label), element("dd", value, small)) for label, value, small in _tiles(report)
    ]
    if tiles:
        yield element("dl", *tiles, class_="tiles")
    yield element("nav", *(element("a", one.title, href=f"#{one.name}") for one in chapters), aria_label="Contents")


def _name(report: Report) -> str:
    return str(part(report.document("plan"), "spec").get("name") or report.build.get("build") or "build")


def _missing(report: Report) -> Iterator[str]:
    """Yields the parts of a finished build that this one lacks, each with the command that makes it."""
    build = report.build.get("build", "BUILD")
    if not report.document("plan"):
        yield "There is no plan: the build was not compiled here."
    elif not report.document("verification"):
        yield "Not verified: compiling was not finished; `minitron compile` goes on where it was."
    if not report.scores:
        yield "No importance scores: nothing was scored, or compiling was not finished."
    trains = report.trains
    done, total = _progress(report)
    if not trains:
        yield "Nothing to train: there is no training plan, or one for evaluation alone."
    elif not report.curves.records:
        yield f"Not trained yet: `minitron train {build}`."
    elif total and done < total:
        yield f"Training is at {figures.percent(done, total)} of its tokens: `minitron train {build}` goes on."
    results = report.document("results")
    if not results:
        yield f"Not evaluated yet: `minitron eval {build}`."
    elif trains and "distilled" not in part(results, "models"):
        yield "The results are of teacher and pruned student alone: `minitron eval` again once it is trained."


def _progress(report: Report) -> tuple[float, int]:
    training = report.document("training")
    return float(part(training, "last").get("tokens") or 0), int(training.get("total_tokens") or 0)


def _tiles(report: Report) -> Iterator[tuple[str, str, Markup | None]]:
    """Yields the figures that readers look for first: label, figure, a line below it."""
    teacher, student = part(report.document("plan"), "teacher"), part(report.document("plan"), "student")
    for label, key, write in (
        ("parameters", "parameters", figures.short),
        ("weights", "weight_bytes", figures.size),
        ("KV cache per token", "kv_cache_bytes_per_token", figures.size),
    ):
        if student.get(key):
            below = f"{figures.percent(student[key], teacher.get(key))} of {write(teacher.get(key))}"
            yield label, write(student[key]), element("small", below)
    results = report.document("results")
    losses = {name: part(part(part(results, "models"), name), "held_out").get("loss") for name in MODELS}
    final = losses["distilled"] if losses["distilled"] is not None else losses["pruned"]
    if final is not None:
        others = [f"{name} {figures.decimal(loss)}" for name, loss in losses.items() if loss not in (None, final)]
        yield "held-out loss", figures.decimal(final), element("small", ", ".join(others)) if others else None
    if results.get("recovered") is not None:
        yield "recovered", figures.percent(results["recovered"]), element("small", "of the loss that pruning cost")
