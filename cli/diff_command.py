"""The command that compares: diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minitron.cli import builds, options
from minitron.cli.diff import Side, diff_sections, difference
from minitron.cli.drafts import load_whole
from minitron.cli.lock_command import follow_lock
from minitron.cli.render import show_sections
from minitron.cli.sections import part
from minitron.specs.builds import PLAN, RESULTS, read_document
from minitron.specs.errors import UsageError

Compared = Annotated[Path, typer.Argument(help="A spec file or a build folder.", show_default=False)]


def diff(a: Compared, b: Compared, as_json: options.Json = False, as_markdown: options.Markdown = False) -> None:
    """Show what changes between two specs or builds: settings, width by width, cost, selection, results."""
    if as_json and as_markdown:
        raise UsageError("--json and --markdown are two renderings of one difference; choose one")
    left, right = _side(a), _side(b)
    content = difference(left, right)
    show_sections(diff_sections(content, left, right), content, as_json=as_json, as_markdown=as_markdown)


def _side(path: Path) -> Side:
    if path.is_dir():
        plan = read_document(builds.require_build(path) / PLAN)
        if plan is None:
            raise UsageError(f"{path}: has no {PLAN}; give a build that `minitron compile` has written, or a spec")
        # plan.json of an older build may not hold the spec.
        spec = part(plan, "spec").get("resolved")
        return Side(str(path), plan, spec, read_document(path / RESULTS))
    from minitron.cli.libraries import quiet_libraries

    loaded = load_whole(path, ())
    quiet_libraries()
    from minitron.compiler import make_plan, plan_document

    plan = plan_document(make_plan(follow_lock(loaded, locked=False), build=loaded.build))
    return Side(str(path), plan, loaded.resolved, None)
