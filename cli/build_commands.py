"""The commands that work on a build: compile, capture, train, eval, run, show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from minitron.cli import builds, figures, interrupts, options, searching
from minitron.cli.build_sections import build_sections, training_section, verification_section
from minitron.cli.device import memory_bytes, pick_device, use_threads
from minitron.cli.drafts import load_whole
from minitron.cli.failures import FAILED
from minitron.cli.libraries import quiet_libraries
from minitron.cli.lock_command import follow_lock
from minitron.cli.output import progress as shown_progress
from minitron.cli.plan_summary import shown_plan
from minitron.cli.processes import process_count, results_wanted, sharing, start
from minitron.cli.ranks import first_process, only_process
from minitron.cli.render import document, say, show_sections, write
from minitron.cli.results_sections import results_sections, shortfalls
from minitron.cli.sections import Column, Document, Section
from minitron.cli.spec_commands import Rendering, preview
from minitron.specs import LoadedSpec
from minitron.specs.builds import (
    LOGITS,
    MODEL,
    PLAN,
    RESULTS,
    STUDENT,
    TRAINING,
    VERIFICATION,
    build_of,
    read_document,
    result_of,
)
from minitron.specs.chain import chain
from minitron.specs.errors import SpecInvalid, UsageError, located
from minitron.specs.progress import Silent
from minitron.specs.spec import float8_uses

if TYPE_CHECKING:
    from minitron.compiler import Plan, SearchPlan


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
        searching.prepare(loaded, build, chosen)
        return
    if not (force or fresh) and searching.is_compiled(loaded, build, candidate):
        say(f"compile: {build} is up to date with {loaded.path}, skipped; --force compiles it again")
        builds.tidy(build)
    else:
        opened = searching.opened_search(loaded, build)
        planned = _prepare(loaded, build, chosen, fresh=True, opened=opened) if fresh else None
        resolved = searching.chosen_plan(
            opened, chosen, lambda of: searching.rungs(of, chosen, count, threads), candidate=candidate
        )
        _compile(loaded, build, chosen, threads, resolved or planned, memory=room, force=force)
    if not first_process():
        return
    plan = read_document(build / PLAN) or {}
    verification = read_document(build / VERIFICATION) or {}
    sections = [*shown_plan(plan, full=full), verification_section(verification), _places(build)]
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
        start("capture", build, count, *_options(chosen, threads, outside=allow_outside))
        return
    stored = _capture(build, chosen, threads, outside=allow_outside)
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
        start("train", build, count, *_options(chosen, threads, unverified=unverified, outside=allow_outside))
        return
    _train(build, chosen, threads, unverified=unverified, outside=allow_outside)
    progress = builds.training_progress(build)
    if first_process():
        show_sections([*([training_section(progress)] if progress else []), _places(build)], {})


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
        more = _options(chosen, threads, unverified=unverified, outside=allow_outside)
        more += ["--tasks", tasks] if tasks is not None else []
        more += ["--limit", str(limit)] if limit is not None else []
        start("eval", build, count, *more, *(["--json"] if as_json else []))
        return
    results = _evaluate(build, chosen, threads, tasks=names, limit=limit, unverified=unverified, outside=allow_outside)
    if first_process():
        show_sections(results_sections(results), results, as_json=as_json)
    if results_wanted():
        _end_with_shortfalls(results)


def _options(chosen: str, threads: int | None, *, unverified: bool = False, outside: bool = False) -> list[str]:
    """Returns the options of a command for the processes that it starts."""
    given = ["--devices", "none", "--device", chosen]
    given += ["--threads", str(threads)] if threads is not None else []
    return given + ["--unverified"] * unverified + ["--allow-outside"] * outside


def _end_with_shortfalls(results: Document) -> None:
    """Ends with exit code 1 where a benchmark failed or a requirement is not met, and names each; the results have been
    written and shown before.
    """
    if reasons := shortfalls(results):
        if first_process():
            say(*reasons)
        raise typer.Exit(FAILED)


def run(
    spec: options.SpecFile,
    output: options.Output = None,
    overrides: options.Overrides = None,
    device: options.Device = None,
    devices: options.Devices = None,
    threads: options.Threads = None,
    locked: options.Locked = False,
    fresh: options.Fresh = False,
) -> None:
    """Compile, train and evaluate, and before that the specs of its teachers; what is there is not done again."""
    only_process("run")
    loaded = load_whole(spec, overrides or (), compiles=True)
    build = builds.build_folder(output, loaded)
    quiet_libraries()
    machine = _Machine(pick_device(device), devices, threads, count=process_count(devices, pick_device(device), device))
    for one in (*chain(loaded), loaded):
        _require_float8(one, machine.device)
    for upper in chain(loaded):
        _run_above(upper, machine, locked=locked)
    _make(loaded, build, machine, locked=locked, fresh=fresh)
    results = machine.evaluate(build)
    show_sections([*results_sections(results), _places(build)], results)
    _end_with_shortfalls(results)


def _require_float8(loaded: LoadedSpec, device: str) -> None:
    """Checks, before a compile, that the training after it can compute in float8. SpecInvalid where it cannot."""
    uses = float8_uses(loaded.spec)
    if any(compute == "float8" for compute, _ in uses):
        import torch

        from minitron.runtime.float8 import float8_problems

        if problems := list(float8_problems(uses, torch.device(device))):
            raise SpecInvalid(located(problems, loaded))


@dataclass(frozen=True)
class _Machine:
    """The devices that `run` works on: each step in this process, or in `count` processes that it starts."""

    device: str
    devices: str | None
    threads: int | None
    count: int

    def capture(self, build: Path) -> None:
        if self.count > 1:
            self._start("capture", build, self.count)
        else:
            _capture(build, self.device, self.threads)

    def search(self, build: Path) -> None:
        searching.rungs(build, self.device, self.count, self.threads)

    def train(self, build: Path) -> None:
        if (count := sharing(build, self.count, self.devices)) > 1:
            self._start("train", build, count)
        else:
            _train(build, self.device, self.threads)

    def evaluate(self, build: Path) -> Document:
        if self.count == 1:
            return _evaluate(build, self.device, self.threads)
        self._start("eval", build, self.count)
        return read_document(build / RESULTS) or {}

    def _start(self, command: str, build: Path, count: int) -> None:
        start(command, build, count, *_options(self.device, self.threads), results=False)


def _run_above(upper: LoadedSpec, machine: _Machine, *, locked: bool) -> None:
    """Compiles and trains the spec whose student is the teacher of another spec; its evaluation is left to a run of its
    own.
    """
    from minitron.compiler import why_not_finished

    if why_not_finished(upper) is None:
        say(f"{upper.path}: {result_of(upper)} is finished and becomes the teacher, skipped")
        return
    say(f"{upper.path}: its result becomes the teacher, so it runs first")
    _make(upper, build_of(upper), machine, locked=locked)
    write("")


def _make(loaded: LoadedSpec, build: Path, machine: _Machine, *, locked: bool, fresh: bool = False) -> None:
    """Compiles where the build is missing or stale; captures and trains where the spec says so."""
    from minitron.compiler import staleness

    loaded = follow_lock(loaded, locked=locked)
    found = staleness(build, loaded)
    if found is None and not fresh:
        say(f"compile: {build} is up to date with {loaded.path}, skipped")
        builds.tidy(build)
    elif found is not None and not found.changed and not fresh:
        say(f"compile: {build} is {found.reason}; the edited values are taken, skipped")
    else:
        opened = searching.opened_search(loaded, build)
        plan = _prepare(loaded, build, machine.device, fresh=fresh, opened=opened)
        use_threads(machine.threads)
        chosen = searching.chosen_plan(opened, machine.device, machine.search)
        _compile(loaded, build, machine.device, machine.threads, chosen or plan)
    interrupts.check()
    if loaded.spec.distill is None:
        say("train: the spec has no `distill` block, skipped")
    else:
        if loaded.spec.distill.teacher_logits != "online" and not builds.is_trained(build):
            machine.capture(build)
        machine.train(build)
    interrupts.check()


def _prepare(loaded: LoadedSpec, build: Path, device: str, *, fresh: bool, opened: SearchPlan | None = None) -> Plan:
    """Plans a compile and shows the plan, for the devices that will do the work, before the long work and not after it: a wrong
    width is seen while it costs nothing. With `fresh` the build that is there is then moved aside. Of an opened search its
    first candidate is shown.
    """
    from minitron.compiler import make_plan, plan_document, read_hardware

    plan = make_plan(loaded, build=build, weights=True) if opened is None else opened.plan(1)
    hardware = read_hardware("cpu" if device == "cpu" else "this", None, None)
    show_sections(shown_plan(content := plan_document(plan, hardware=hardware), full=False), content)
    write("")
    if fresh:
        builds.move_aside(build)
    return plan


def export(
    build: options.BuildFolder,
    as_gguf: Annotated[bool, typer.Option("--gguf", help="Write one GGUF file, for llama.cpp.")] = False,
    as_whole: Annotated[
        bool,
        typer.Option("--whole", help="Write the multimodal model with the student as its language tower."),
    ] = False,
    weight_type: Annotated[
        Literal["f32", "bf16", "q8_0"], typer.Option("--type", help="How matrices are stored in it.")
    ] = "bf16",
    pre: Annotated[
        str | None,
        typer.Option("--pre", metavar="NAME", help="What llama.cpp calls the tokenizer's rules for cutting text."),
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
    show_sections([*build_sections(content, full=full), _places(build)], content, as_json=as_json)


def _write_report(build: Path, *, as_json: bool) -> None:
    from minitron.cli.report import write_report

    path = str(write_report(build))
    write(document({"report": path}) if as_json else path)


def _compile(
    loaded: LoadedSpec,
    build: Path,
    device: str,
    threads: int | None,
    plan: Plan | None = None,
    *,
    memory: int | None = None,
    force: bool = False,
) -> None:
    from minitron.compiler import Work, compile_spec, join_ranks

    use_threads(threads)
    with join_ranks(device) as (ranks, own):
        compile_spec(
            loaded, build, device=own, progress=shown_progress() if ranks.leads else Silent(), plan=plan,
            work=Work(memory, ranks, force),
        )  # fmt: skip


def _capture(build: Path, device: str, threads: int | None, *, outside: bool = False) -> Document:
    from minitron.runtime import record

    use_threads(threads)
    return record(build, device=device, progress=shown_progress(), outside=outside)


def _train(build: Path, device: str, threads: int | None, *, unverified: bool = False, outside: bool = False) -> None:
    from minitron.runtime import train as execute

    use_threads(threads)
    progress = shown_progress()
    execute(build, device=device, progress=progress, unverified=unverified, outside=outside)


def _evaluate(
    build: Path,
    device: str,
    threads: int | None,
    *,
    tasks: list[str] | None = None,
    limit: int | None = None,
    unverified: bool = False,
    outside: bool = False,
) -> Document:
    from minitron.runtime import evaluate as measure

    use_threads(threads)
    return measure(
        build, device=device, progress=shown_progress(),
        tasks=tasks, limit=limit, unverified=unverified, outside=outside,
    )  # fmt: skip


def _places(build: Path) -> Section:
    """Returns the paths of the models and documents of a build, those that exist."""
    rows = [("build", str(build))]
    for label, name in (
        ("pruned student", STUDENT),
        ("training plan", TRAINING),
        ("teacher logits", LOGITS),
        ("distilled student", MODEL),
        ("results", RESULTS),
    ):
        if (build / name).exists():
            rows.append((label, str(build / name)))
    return Section("Files", (Column(""), Column("path")), tuple(rows))
