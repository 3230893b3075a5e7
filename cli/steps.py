"""The steps of a build, each in this process, and what commands show before and after them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from minitron.cli import builds
from minitron.cli.device import use_threads
from minitron.cli.failures import FAILED
from minitron.cli.output import progress as shown_progress
from minitron.cli.plan_summary import shown_plan
from minitron.cli.ranks import first_process
from minitron.cli.render import say, show_sections, write
from minitron.cli.results_sections import shortfalls
from minitron.cli.sections import Column, Document, Section
from minitron.specs import LoadedSpec
from minitron.specs.builds import LOGITS, MODEL, RESULTS, STUDENT, TRAINING
from minitron.specs.progress import Silent

if TYPE_CHECKING:
    from minitron.compiler import Plan, SearchPlan


def show_plan_first(
    loaded: LoadedSpec, build: Path, device: str, *, fresh: bool, opened: SearchPlan | None = None
) -> Plan:
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


def compile_build(
    loaded: LoadedSpec,
    build: Path,
    device: str,
    threads: int | None,
    plan: Plan | None = None,
    *,
    memory: int | None = None,
    force: bool = False,
) -> None:
    """Compiles a spec, or the `plan` of it, into the folder `build`, together with the processes that torchrun started."""
    from minitron.compiler import Work, compile_spec, join_ranks

    use_threads(threads)
    with join_ranks(device) as (ranks, own):
        compile_spec(
            loaded, build, device=own, progress=shown_progress() if ranks.leads else Silent(), plan=plan,
            work=Work(memory, ranks, force),
        )  # fmt: skip


def capture(build: Path, device: str, threads: int | None, *, outside: bool = False) -> Document:
    """Stores samples of the teacher's distribution and returns {samples, tokens, bytes, folder}."""
    from minitron.runtime import record

    use_threads(threads)
    return record(build, device=device, progress=shown_progress(), outside=outside)


def train(build: Path, device: str, threads: int | None, *, unverified: bool = False, outside: bool = False) -> None:
    """Trains the student of a build, from its last checkpoint where there is one."""
    from minitron.runtime import train as execute

    use_threads(threads)
    execute(build, device=device, progress=shown_progress(), unverified=unverified, outside=outside)


def evaluate(
    build: Path,
    device: str,
    threads: int | None,
    *,
    tasks: list[str] | None = None,
    limit: int | None = None,
    unverified: bool = False,
    outside: bool = False,
) -> Document:
    """Measures the models of a build and returns the content of results.json."""
    from minitron.runtime import evaluate as measure

    use_threads(threads)
    return measure(
        build, device=device, progress=shown_progress(),
        tasks=tasks, limit=limit, unverified=unverified, outside=outside,
    )  # fmt: skip


def places(build: Path) -> Section:
    """Returns the section with the paths of the models and documents of a build, those that exist."""
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


def end_with_shortfalls(results: Document) -> None:
    """Ends with exit code 1 where a benchmark failed or a requirement is not met, and names each; the results have been
    written and shown before.
    """
    if reasons := shortfalls(results):
        if first_process():
            say(*reasons)
        raise typer.Exit(FAILED)
