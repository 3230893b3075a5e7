"""The commands that need a spec and no weights: validate, schema, plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from minitron.cli import options
from minitron.cli.builds import build_folder
from minitron.cli.drafts import load_whole
from minitron.cli.failures import WRONG, errors_document, failure_of
from minitron.cli.lock_command import follow_lock
from minitron.cli.plan_summary import shown_plan
from minitron.cli.render import complain, document, say, show_sections, write
from minitron.cli.sections import Document
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.errors import Problem, SpecError, SpecInvalid, UsageError, located
from minitron.specs.float8 import missing_library
from minitron.specs.idle_keys import idle_keys
from minitron.specs.lockfile import LOCK_SUFFIX
from minitron.specs.spec import float8_uses
from minitron.specs.tracking import missing_trackers

# What `plan --detailed-exitcode` ends with when there is something to compile.
NOT_UP_TO_DATE = 3


def validate(
    specs: Annotated[list[Path], typer.Argument(metavar="SPEC", help="Spec files.", show_default=False)],
    overrides: options.Overrides = None,
    as_json: options.Json = False,
) -> None:
    """Check spec files alone: no network, no teacher, all mistakes of all files at once."""
    valid: list[Document] = []
    errors: list[SpecError] = []
    warnings: list[SpecError] = []
    for path in specs:
        if path.name.endswith(LOCK_SUFFIX):
            say(f"{path}: a lock file and no spec, passed over")  # what `specs/*.yaml` names as well
            continue
        try:
            loaded = load_spec(path, overrides or ())
        except UsageError as error:
            failure = failure_of(error)
            errors += failure.errors
            if not as_json:
                complain(*failure.lines())
            continue
        valid.append({"file": str(path), "name": loaded.spec.name, "sha256": loaded.sha256})
        early = located([*_untracked(loaded), *idle_keys(loaded)], loaded)
        warnings += early
        if not as_json:
            write(f"{path}: valid")
            say(*(f"warning: {one}" for one in early))
    if as_json:
        lists = {"errors": errors_document(errors), "warnings": errors_document(warnings)}
        write(document({"valid": not errors, "specs": valid, **lists}))
    elif errors:
        complain(f"{len(errors)} {'error' if len(errors) == 1 else 'errors'}")
    if errors:
        raise typer.Exit(WRONG)


def _untracked(loaded: LoadedSpec) -> list[Problem]:
    """Returns the trackers and the library that are not installed here: training refuses to begin without them."""
    distill = loaded.spec.distill
    if distill is None:
        return []
    return [*missing_trackers(distill.track or (), "distill.track"), *missing_library(*float8_uses(loaded.spec))]


def schema() -> None:
    """Print the JSON Schema of specs, for editors."""
    from minitron.specs import json_schema_text

    write(json_schema_text())


def plan(
    spec: options.SpecFile,
    output: options.Output = None,
    overrides: options.Overrides = None,
    as_json: options.Json = False,
    as_markdown: options.Markdown = False,
    detailed_exitcode: options.DetailedExitcode = False,
    locked: options.Locked = False,
    device: options.PlannedDevice = None,
    mfu: options.Mfu = None,
    measured: options.Measured = None,
    full: options.Full = False,
) -> None:
    """Preview: check every width against the teacher and print what would be done and what it would cost."""
    rendering = Rendering(as_json, as_markdown, detailed_exitcode, full)
    preview(spec, overrides or (), output, rendering, locked=locked, device=device, mfu=mfu, measured=measured)


@dataclass(frozen=True)
class Rendering:
    """The form in which a plan is shown, and whether the exit code tells that there is something to compile."""

    as_json: bool
    as_markdown: bool
    detailed_exitcode: bool
    full: bool = False


def preview(
    spec: Path,
    overrides: Sequence[str],
    output: Path | None,
    rendering: Rendering,
    *,
    locked: bool,
    device: str | None,
    mfu: float | None,
    measured: str | None,
) -> None:
    """Shows the preview of a spec: `plan`, and `compile --dry-run`, which does the same."""
    if rendering.as_json and rendering.as_markdown:
        raise UsageError("--json and --markdown are two renderings of one plan; choose one")
    from minitron.cli.libraries import quiet_libraries

    quiet_libraries()
    from minitron.compiler import make_plan, plan_document, read_hardware, why_stale

    errors: list[SpecError] = []
    plan, hardware = None, None
    # All in one go: what is wrong with the call, with the spec, and with it for this teacher.
    try:
        hardware = read_hardware(device, mfu, measured)
    except UsageError as error:
        errors += failure_of(error).errors
    try:
        loaded = follow_lock(load_whole(spec, overrides), locked=locked)
        build = build_folder(output, loaded)
        plan = make_plan(loaded, build=build)
    except UsageError as error:
        errors += failure_of(error).errors
    if plan is None or hardware is None:
        raise SpecInvalid(errors)
    say(*(f"warning: {one}" for one in located(_untracked(loaded), loaded)))
    content = plan_document(plan, hardware=hardware)
    stale = why_stale(build, loaded)
    sections = shown_plan(content, full=rendering.full, build=f"{build} is {stale or 'up to date'}")
    show_sections(sections, content, as_json=rendering.as_json, as_markdown=rendering.as_markdown)
    if rendering.detailed_exitcode and stale is not None:
        say(f"{build} is {stale}")
        raise typer.Exit(NOT_UP_TO_DATE)
