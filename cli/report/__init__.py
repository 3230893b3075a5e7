"""The report of a build, BUILD/report.html: everything that is known about the build on one self-contained page."""

from __future__ import annotations

from pathlib import Path

from minitron.cli import builds
from minitron.cli.report.curves import read_curves
from minitron.cli.report.page import Report, page
from minitron.cli.report.scores import read_scores
from minitron.cli.sections import part
from minitron.specs.atomic import write_text
from minitron.specs.builds import REPORT, TRAINING, correction_metrics_file, metrics_file
from minitron.specs.json_files import json_lines


def write_report(build: Path) -> Path:
    """Writes BUILD/report.html from the parts of the build that exist, and returns its path. WorkError for broken
    files.
    """
    document = builds.show_document(build)
    curves, correction = (
        read_curves(json_lines(path)) for path in (metrics_file(build), correction_metrics_file(build))
    )
    trains = builds.total_tokens(build / TRAINING) is not None
    report = Report(document, trains, read_scores(build, part(document, "plan")), curves, correction)
    path = build / REPORT
    write_text(path, page(report))
    return path
