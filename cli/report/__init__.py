"""BUILD/report.html: everything that is known about a build on one page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from minitron.cli import builds
from minitron.cli.report.curves import read_curves
from minitron.cli.report.page import Report, page
from minitron.cli.report.scores import read_scores
from minitron.cli.sections import part
from minitron.specs.atomic import write_text

FILE = "report.html"


def write_report(build: Path) -> Path:
    """Writes BUILD/report.html, whatever of the build is there yet, and returns its path. WorkError for broken files."""
    document = builds.show_document(build)
    curves, correction = (
        read_curves(builds.records(build / name)) for name in (builds.METRICS, builds.CORRECTION_METRICS)
    )
    trains = builds.total_tokens(build / builds.TRAINING) is not None
    report = Report(document, trains, read_scores(build, part(document, "plan")), curves, correction)
    path = build / FILE
    write_text(path, page(report))
    return path
