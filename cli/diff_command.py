"""The command that compares: diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minitron.cli import builds, options
from minitron.cli.diff import Side, diff_sections, difference
from minitron.cli.render import show_sections
from minitron.specs.builds import build_of
from minitron.specs.errors import UsageError

Compared = Annotated[Path, typer.Argument(help="A spec file or a build folder.", show_default=False)]


def diff(a: Compared, b: Compared, as_json: options.Json = False) -> None:
    """Show what changes between two specs or builds, width by width and in cost."""
    left, right = _side(a), _side(b)
    content = difference(left, right)
    show_sections(diff_sections(content, left, right), content, as_json=as_json)


def _side(path: Path) -> Side:
    if path.is_dir():
        plan = builds.read_document(builds.require_build(path) / builds.PLAN)
        if plan is None:
            raise UsageError(
                f"{path}: has no {builds.PLAN}; give a build that `minitron compile` has written, or a spec"
            )
        return Side(str(path), plan, None)
    from minitron.cli.libraries import quiet_libraries
    from minitron.specs import load_spec

    loaded = load_spec(path)
    quiet_libraries()
    from minitron.compiler import make_plan

    build = build_of(loaded)
    return Side(str(path), make_plan(loaded, build=build).to_json(), loaded.resolved)
