"""The commands that work on one build: compile, verify, capture, train, eval, export, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from minitron.cli import builds, figures, options, search_command, steps
from minitron.cli.build_sections import build_sections, training_section, verification_section
from minitron.cli.device import memory_bytes, pick_device, use_threads
from minitron.cli.drafts import load_whole
from minitron.cli.libraries import quiet_libraries
from minitron.cli.lock_command import follow_lock
from minitron.cli.output import progress as shown_progress
from minitron.cli.plan_summary import shown_plan
from minitron.cli.processes import process_count, process_options, results_wanted, sharing, start
from minitron.cli.ranks import first_process, only_process
from minitron.cli.render import document, say, show_sections, write
from minitron.cli.results_sections import results_sections
from minitron.cli.sections import Column, Section
from minitron.cli.spec_commands import Rendering, preview
from minitron.specs.builds import (
    PLAN,
    VERIFICATION,
    read_document,
)
from minitron.specs.errors import UsageError


def compile_command(
    spec: options.SpecFile,
    output: options.Output = None,
    overrides: options.Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the preview: the same as `plan`.")] = False,
    device: options.Device = None,
    devices: options.Devices = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    as_markdown: options.Markdown = False,
    detailed_exitcode: options.DetailedExitcode = False,
    locked: options.Locked = False,
    mfu: options.Mfu = None,
    measured: options.Measured = None,
    full: options.Full = False,
    fresh: options.Fresh = False,
    candidate: options.Candidate = None,
    prepare: options.Prepare = False,
    memory: options.Memory = None,
    force: options.Force = False,
) -> None:
    """Score, select, rewrite, write the pruned student and its training plan, verify; of a search, its best candidate."""
    if dry_run:
        rendering = Rendering(as_json, as_markdown, detailed_exitcode, full)
        preview(spec, overrides or (), output, rendering, locked=locked, device=device, mfu=mfu, measured=measured)
        return
    if as_markdown or detailed_exitcode or mfu is not None or measured is not None:
        raise UsageError("--markdown, --detailed-exitcode, --mfu and --measured belong to the preview; add --dry-run")
    room = memory_bytes(memory)
    loaded = load_whole(spec, overrides or (), compiles=True)
    build = builds.build_folder(output, loaded)
    quiet_libraries()
    loaded = follow_lock(loaded, locked=locked)
    chosen = pick_device(device)
    use_threads(threads)
    count = process_count(devices, chosen, device)
    if prepare:
        only_process("compile --prepare")
        search_command.prepare(loaded, build, chosen)
        return
    if not (force or fresh) and search_command.is_compiled(loaded, build, candidate):
        say(f"compile: {build} is up to date with {loaded.path}, skipped; --force compiles it again")
        builds.tidy(build)
    else:
        opened = search_command.opened_search(loaded, build)
        planned = steps.show_plan_first(loaded, build, chosen, fresh=True, opened=opened) if fresh else None
        resolved = search_command.chosen_plan(
            opened, chosen, lambda of: search_command.rungs(of, chosen, count, threads), candidate=candidate
        )
        steps.compile_build(loaded, build, chosen, threads, resolved or planned, memory=room, force=force)
    if not first_process():
        return
    plan = read_document(build / PLAN) or {}
    verification = read_document(build / VERIFICATION) or {}
    sections = [*shown_plan(plan, full=full), verification_section(verification), steps.places(build)]
    show_sections(sections, plan, as_json=as_json)


def verify(
    build: options.BuildFolder,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Run every check of a compile on a build as it lies there; exit code 1 where one fails, with what differs."""
    from minitron.compiler import verify_build

    only_process("verify")
    builds.require_build(build)
    quiet_libraries()
    use_threads(threads)
    verify_build(build, device=pick_device(device), progress=shown_progress())
    verification = read_document(build / VERIFICATION) or {}
    show_sections([verification_section(verification)], verification, as_json=as_json)


def capture(
    build: options.BuildFolder,
    device: options.Device = None,
    devices: options.Devices = None,
    threads: options.Threads = None,
    allow_outside: options.AllowOutside = False,
) -> None:
    """Store samples of the teacher's distribution, for `teacher_logits: {sampled: N}`; done once, resumable."""
    builds.require_build(build)
    quiet_libraries()
    chosen = pick_device(device)
    if (count := process_count(devices, chosen, device)) > 1:
        start("capture", build, count, *process_options(chosen, threads, outside=allow_outside))
        return
    stored = steps.capture(build, chosen, threads, outside=allow_outside)
    rows = (
        ("sequences", figures.count(stored["samples"])),
        ("tokens", figures.count(stored["tokens"])),
        ("size on disk", figures.size(stored["bytes"])),
        ("folder", str(stored["folder"])),
    )
    if first_process():
        show_sections([Section("Teacher logits", (Column(""), Column("", right=True)), rows)], stored)


def train(
    build: options.BuildFolder,
    device: options.Device = None,
    devices: options.Devices = None,
    threads: options.Threads = None,
    unverified: options.Unverified = False,
    allow_outside: options.AllowOutside = False,
) -> None:
    """Execute the training plan of a build; what an interrupted run has done is not done again."""
    builds.require_training_plan(build)
    quiet_libraries()
    chosen = pick_device(device)
    if (count := sharing(build, process_count(devices, chosen, device), devices)) > 1:
        start("train", build, count, *process_options(chosen, threads, unverified=unverified, outside=allow_outside))
        return
    steps.train(build, chosen, threads, unverified=unverified, outside=allow_outside)
    progress = builds.training_progress(build)
    if first_process():
        show_sections([*([training_section(progress)] if progress else []), steps.places(build)], {})


def evaluate(
    build: options.BuildFolder,
    device: options.Device = None,
    devices: options.Devices = None,
    threads: options.Threads = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAME,...", help="Measure these benchmarks instead of the whole suite."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Ask the first N questions of each task, for a first look."),
    ] = None,
    as_json: options.Json = False,
    unverified: options.Unverified = False,
    allow_outside: options.AllowOutside = False,
) -> None:
    """Measure teacher, pruned and distilled model side by side; what was measured before is not measured again."""
    builds.require_build(build)
    names = None if tasks is None else [name for part in tasks.split(",") if (name := part.strip())]
    if names == []:
        raise UsageError("--tasks names no benchmark; write --tasks hellaswag,mmlu")
    quiet_libraries()
    chosen = pick_device(device)
    if (count := process_count(devices, chosen, device)) > 1:
        more = process_options(chosen, threads, unverified=unverified, outside=allow_outside)
        more += ["--tasks", tasks] if tasks is not None else []
        more += ["--limit", str(limit)] if limit is not None else []
        start("eval", build, count, *more, *(["--json"] if as_json else []))
        return
    results = steps.evaluate(
        build, chosen, threads, tasks=names, limit=limit, unverified=unverified, outside=allow_outside
    )
    if first_process():
        show_sections(results_sections(results), results, as_json=as_json)
    if results_wanted():
        steps.end_with_shortfalls(results)


def export(
    build: options.BuildFolder,
    as_gguf: Annotated[bool, typer.Option("--gguf", help="Write one GGUF file, for llama.cpp.")] = False,
    as_whole: Annotated[
        bool,
        typer.Option("--whole", help="Write the multimodal model with the student as its language tower."),
    ] = False,
    weight_type: Annotated[
        Literal["f32", "bf16", "q8_0"], typer.Option("--type", help="The type that matrices are stored in.")
    ] = "bf16",
    pre: Annotated[
        str | None,
        typer.Option("--pre", metavar="NAME", help="The name in llama.cpp of the tokenizer's rules for cutting text."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="The file or folder; BUILD/model-TYPE.gguf or BUILD/whole by default.",
        ),
    ] = None,
) -> None:
    """Write the student of a build in another program's format, or back among the other towers of its teacher."""
    if as_gguf == as_whole:
        raise UsageError("name one form to export: `minitron export BUILD --gguf` or `minitron export BUILD --whole`")
    only_process("export")
    builds.require_build(build)
    quiet_libraries()
    if as_whole:
        from minitron.compiler import export_whole

        write(str(export_whole(build, output, progress=shown_progress())))
        return
    from minitron.runtime.export import export_gguf

    written = export_gguf(build, output, weight_type, pre=pre, progress=shown_progress())
    write(str(written))


def show(
    build: options.BuildFolder,
    as_json: options.Json = False,
    full: options.Full = False,
    as_html: Annotated[
        bool, typer.Option("--html", help="Write BUILD/report.html, one page with charts that needs nothing else.")
    ] = False,
) -> None:
    """Show the plan, the selection, training progress, checks and results of a build."""
    if as_html:
        _write_report(builds.require_build(build), as_json=as_json)
        return
    content = builds.show_document(builds.require_build(build))
    show_sections([*build_sections(content, full=full), steps.places(build)], content, as_json=as_json)


def _write_report(build: Path, *, as_json: bool) -> None:
    from minitron.cli.report import write_report

    path = str(write_report(build))
    write(document({"report": path}) if as_json else path)
